/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What programs share that take pods' packets past the host's stack: where the node's pods
 * are, whether that is allowed, and a hop as a router makes it.
 */
#pragma once

#include "packet.h"

/* Where an address of a pod of this node is. */
struct home {
	__u32 device; /* the node's end */
	__u32 mtu;    /* of the device, in bytes */
	__u8 direct;  /* nobody looks at what the device sends: the pod gets it at once */
	__u8 zero;
	__u8 ethernet[12]; /* what its frames begin with: the pod's end, the node's end */
	__u8 end[2];
};

/* layer/pod writes it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, struct home);
	__uint(max_entries, 8192); /* two of each pod; Kubernetes plans for 110 on a node */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} homes SEC(".maps");

/* Whether shortcuts are open: 1, or 0 where somebody's rules need to see packets. Each
 * layer has its own. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} gates SEC(".maps");

static __always_inline bool is_open(void)
{
	__u32 zero = 0, *gate = bpf_map_lookup_elem(&gates, &zero);

	return gate && *gate;
}

/* is_for_router says whether a frame is for this machine, of no VLAN: others the stack
 * sees first. */
static __always_inline bool is_for_router(const struct __sk_buff *skb)
{
	return skb->pkt_type == PACKET_HOST && !skb->vlan_present;
}

/* readdress writes what a frame begins with. False if there is no room for it. */
static __always_inline bool readdress(struct __sk_buff *skb, const __u8 *ethernet)
{
	void *frame = (void *)(long)skb->data;

	if (frame + ETHERNET_LENGTH > (void *)(long)skb->data_end)
		return false;
	__builtin_memcpy(frame, ethernet, sizeof(((struct home *)0)->ethernet));
	return true;
}

/* age makes the packet whose IP header is at an offset one hop older (RFC 1812, 5.3.1;
 * RFC 8200, 3). The IPv4 checksum goes up by what the time to live goes down (RFC 1141).
 * IPv6 has none, so there the sum that a card has made of the packet goes with it. */
static __always_inline bool age(struct __sk_buff *skb, __u32 at, bool ip4)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (at > HEADERS_LIMIT)
		return false;
	if (ip4) {
		struct ip4_header *ip = data + at;
		__u32 sum;

		if ((void *)(ip + 1) > end)
			return false;
		sum = ip->checksum + __builtin_bswap16(0x0100);
		ip->checksum = sum + (sum >= 0xffff);
		ip->ttl--;
		return true;
	}
	struct ip6_header *ip = data + at;
	__u8 hops;

	if ((void *)(ip + 1) > end)
		return false;
	hops = ip->hops - 1;
	return !bpf_skb_store_bytes(skb, at + __builtin_offsetof(struct ip6_header, hops), &hops, 1,
				    BPF_F_RECOMPUTE_CSUM);
}
