//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* From pod to pod of one node, without the host's stack.
 *
 * pod_from_pod sees what a pod sends, after the programs that translate it
 * (layer/dns, layer/service). A packet to another pod of the node goes to that pod at
 * once, one hop older, as by a router; everything else goes on to the host's stack,
 * untouched: what is for the node or for elsewhere, what another address than the pod's
 * sends, IP options, hop limits that end here, and all while shortcuts are closed.
 *
 * A policy for the target has to be decided here, before the packet is handed over:
 * nothing on the node sees it afterwards.
 */
#include "../../bpf/shortcut.h"

/* What became of the packets of pods. The names in metrics are read from this enum's BTF,
 * in lower case and without the prefix. */
enum crossing {
	CROSSING_DIRECT, /* handed to the other pod at once */
	CROSSING_DEVICE, /* sent by the other pod's device, where somebody looks at packets */
	CROSSING_STACK,  /* left to the host's stack */
	CROSSING_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum crossing);
	__type(value, __u64);
	__uint(max_entries, CROSSING_COUNT);
} crossings SEC(".maps");

static __always_inline int crossed(enum crossing crossing, int verdict)
{
	__u64 *n = bpf_map_lookup_elem(&crossings, &crossing);

	if (n)
		(*n)++;
	return verdict;
}

/* The two ends of a packet. */
struct journey {
	struct address source;
	struct address destination;
};

/* read_journey reads who sends a packet to whom. False for what the stack has to see: no
 * IP, IP options, its last hop. */
static __always_inline bool read_journey(struct __sk_buff *skb, struct journey *j)
{
	void *data = (void *)(long)skb->data + ETHERNET_LENGTH, *end = (void *)(long)skb->data_end;

	if (!is_for_router(skb))
		return false;
	if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP4)) {
		const struct ip4_header *ip = data;

		if ((const void *)(ip + 1) > end || ip->version_length != 0x45 || ip->ttl <= 1)
			return false;
		j->source = address_from_ip4(ip->source);
		j->destination = address_from_ip4(ip->destination);
		return true;
	}
	if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP6)) {
		const struct ip6_header *ip = data;

		if ((const void *)(ip + 1) > end || *(const __u8 *)ip >> 4 != 6 || ip->hops <= 1)
			return false;
		j->source = ip->source;
		j->destination = ip->destination;
		return true;
	}
	return false;
}

/* find_home says where a packet goes that may take the shortcut; NULL for others. */
static __always_inline struct home *find_home(struct __sk_buff *skb, const struct journey *j)
{
	struct home *to = bpf_map_lookup_elem(&homes, &j->destination), *from;

	if (!to || to->device == skb->ifindex) /* most of what is not for a pod of the node ends here */
		return NULL;
	from = bpf_map_lookup_elem(&homes, &j->source);
	if (!from || from->device != skb->ifindex || to->mtu < from->mtu)
		return NULL;
	return to;
}

SEC("tcx/ingress")
int pod_from_pod(struct __sk_buff *skb)
{
	struct journey j;
	struct home *found, to;

	if (!is_open() || !read_journey(skb, &j))
		return crossed(CROSSING_STACK, TC_ACT_UNSPEC);
	found = find_home(skb, &j);
	if (!found)
		return crossed(CROSSING_STACK, TC_ACT_UNSPEC);
	to = *found; /* what follows may move the packet, not the entry */
	if (!age(skb, ETHERNET_LENGTH, skb->protocol == __builtin_bswap16(ETHERTYPE_IP4)) ||
	    !readdress(skb, to.ethernet))
		return TC_ACT_SHOT; /* half rewritten: never seen */
	if (to.direct)
		return crossed(CROSSING_DIRECT, bpf_redirect_peer(to.device, 0));
	return crossed(CROSSING_DEVICE, bpf_redirect(to.device, 0));
}

char __license[] SEC("license") = "Dual MIT/GPL";
