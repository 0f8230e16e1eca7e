//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* From pods of this node to pods of others and back, past the hosts' stacks.
 *
 *   pod -> route_from_pod -> uplink ~~~ uplink -> route_from_wire -> pod
 *
 * To a node on the same segment packets go as they are, one hop older, as by a router. To
 * others in VXLAN (RFC 7348): what pods send is put into a packet to that node, and what
 * comes from there is taken out, without a vxlan device on the way and without cutting
 * large packets up (GSO).
 *
 * The node has a vxlan device of the kernel all the same. By it goes what the stack itself
 * sends to other nodes' pods (route_to_remote), and what the stack is to see of what
 * comes: what is for the node, for pods without a neighbour entry, and whatever these
 * programs do not understand (route_unwrapped asks who sent it).
 */
#include "../../bpf/shortcut.h"

/* A range of addresses; length is in bits, of 128. */
struct range {
	__u32 length;
	struct address address;
};

/* The way to another node. */
struct remote {
	struct address vtep;  /* where it takes packets, ... */
	struct address local; /* ... and from where they come, in VXLAN */
	__u32 uplink;         /* the device by which they go */
	__u16 mtu;            /* the longest packet of a pod, in bytes */
	__u8 ip4;             /* vtep is an IPv4 address */
	__u8 near;            /* vtep is a neighbour there; otherwise the node's routes are asked */
	__u8 mac[6];          /* that of its vxlan device, ... */
	__u8 own_mac[6];      /* ... and of ours */
	__u8 direct;          /* packets go as they are, and come so */
	__u8 zero[3];
};

/* By the ranges of their pods. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct range);
	__type(value, struct remote);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} remotes SEC(".maps");

/* An address at which packets are taken. */
struct vtep {
	__u32 device; /* our vxlan device; 0: it is another node's */
	__u8 mac[6];  /* the device's */
	__u8 zero[2];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, struct vtep);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} vteps SEC(".maps");

/* The node's ends of pods' veths, by their indices. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u8);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} ports SEC(".maps");

/* What became of packets. The names in metrics are read from this enum's BTF, in lower
 * case and without the prefix. */
enum outcome {
	OUTCOME_SENT,         /* of a pod, put into VXLAN */
	OUTCOME_SENT_DIRECT,  /* of a pod, given to the uplink as it is */
	OUTCOME_SENT_STACK,   /* of the node's stack, put into VXLAN */
	OUTCOME_TAKEN,        /* taken out of VXLAN and given to a pod */
	OUTCOME_TAKEN_DIRECT, /* come as it is from a node on the segment, and given to a pod */
	OUTCOME_TAKEN_STACK,  /* taken out of VXLAN and given to the node's stack */
	OUTCOME_STACK,        /* of a pod, left to the stack, which has to see it or to check it */
	OUTCOME_TOO_BIG,      /* left to the stack, which says so to the sender */
	OUTCOME_EXPIRED,      /* likewise: it has made too many hops */
	OUTCOME_STRANGER,     /* dropped: VXLAN that comes from no node of the cluster */
	OUTCOME_CONGESTED,    /* dropped: a router met congestion, and the packet cannot say so (RFC 6040, 4.2) */
	OUTCOME_UNWRITABLE,   /* left to the stack: the kernel refused to change the packet */
	OUTCOME_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum outcome);
	__type(value, __u64);
	__uint(max_entries, OUTCOME_COUNT);
} outcomes SEC(".maps");

/* The network that nodes speak in VXLAN. It is no setting of the programs: where flannel
 * comes or goes, it becomes another one, and what runs goes on. */
struct network {
	__be16 port; /* of UDP */
	__u16 zero;
	__be32 vni; /* in the upper 24 bits */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct network);
	__uint(max_entries, 1);
} networks SEC(".maps");

/* Nothing has to run at the node's ends of the veths of pods that are not in homes. */
const volatile bool to_peer = false;
/* The kernel can be told that the family of a packet changes (Linux 6.3). */
const volatile bool can_relabel = false;

#define UDP_HEADER   8
#define VXLAN_FLAGS  0x08  /* the network's number is valid; nothing else is asked (RFC 7348, 5) */
#define OUTER_HOPS   64    /* IP_DEFAULT_TTL, as the kernel's vxlan */
#define FIRST_SOURCE 49152 /* source ports are 49152 to 65535 (RFC 7348, 5) */
#define ECN          0x03
#define ECN_ECT1     0x01
#define ECN_ECT0     0x02
#define ECN_CE       0x03

struct udp_header {
	__be16 source_port;
	__be16 destination_port;
	__be16 length;
	__u16 checksum;
};

struct ethernet {
	__u8 destination[6];
	__u8 source[6];
	__be16 type;
};

struct vxlan_header {
	__be32 flags;
	__be32 vni;
};

#define INSIDE_LENGTH (UDP_HEADER + (int)sizeof(struct vxlan_header) + ETHERNET_LENGTH)
#define ROOM4         ((int)sizeof(struct ip4_header) + INSIDE_LENGTH)
#define ROOM6         ((int)sizeof(struct ip6_header) + INSIDE_LENGTH)

static __always_inline void count(enum outcome outcome)
{
	__u64 *n = bpf_map_lookup_elem(&outcomes, &outcome);

	if (n)
		(*n)++;
}

static __always_inline int finish(enum outcome outcome, int verdict)
{
	count(outcome);
	return verdict;
}

/* our_network is the one network that there is; NULL never happens. */
static __always_inline const struct network *our_network(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&networks, &zero);
}

static __always_inline __be16 to_be16(__u16 value)
{
	return __builtin_bswap16(value);
}

/* What is known of the packet inside. */
struct inner {
	struct address source;
	struct address destination;
	__u32 at;     /* offset of its IP header */
	__u16 header; /* length of that */
	__u8 protocol;
	__u8 tos;
	__u8 hops;
	bool ip4;
};

/* read_inner reads the IP header at an offset. False for what is no IP, and for what the
 * linear part does not have. */
static __always_inline bool read_inner(struct __sk_buff *skb, __u32 at, __be16 type, struct inner *in)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	in->at = at;
	if (type == __builtin_bswap16(ETHERTYPE_IP4)) {
		const struct ip4_header *ip = data + at;

		if ((const void *)(ip + 1) > end || ip->version_length >> 4 != 4)
			return false;
		in->ip4 = true;
		in->header = (ip->version_length & 0x0f) * 4;
		in->source = address_from_ip4(ip->source);
		in->destination = address_from_ip4(ip->destination);
		in->protocol = ip->protocol;
		in->tos = ip->tos;
		in->hops = ip->ttl;
		return true;
	}
	if (type == __builtin_bswap16(ETHERTYPE_IP6)) {
		const struct ip6_header *ip = data + at;
		const __u8 *first = (const void *)ip;

		if ((const void *)(ip + 1) > end || first[0] >> 4 != 6)
			return false;
		in->ip4 = false;
		in->header = sizeof(*ip);
		in->source = ip->source;
		in->destination = ip->destination;
		in->protocol = ip->next;
		in->tos = first[0] << 4 | first[1] >> 4;
		in->hops = ip->hops;
		return true;
	}
	return false;
}

/* has_options says whether there is something that routers have to read (RFC 791, 3.1; RFC
 * 8200, 4.3). */
static __always_inline bool has_options(const struct inner *in)
{
	return in->ip4 ? in->header != sizeof(struct ip4_header) : in->protocol == IP6_HOP_BY_HOP;
}

#define TOO_LONG 0xffff

/* longest is the length of the packet, or of the longest that a large one will be cut
 * into; TOO_LONG where that cannot be told. */
static __always_inline __u32 longest(struct __sk_buff *skb, const struct inner *in)
{
	__u32 header = in->header;
	__u8 offset;

	if (!skb->gso_size)
		return skb->len - in->at;
	if (in->protocol == IPPROTO_UDP)
		return header + UDP_HEADER + skb->gso_size;
	if (in->protocol != IPPROTO_TCP || bpf_skb_load_bytes(skb, in->at + header + 12, &offset, 1))
		return TOO_LONG;
	return header + (offset >> 4) * 4 + skb->gso_size;
}

/* mark makes the congestion bits of the packet inside others. */
static __always_inline bool mark(struct __sk_buff *skb, const struct inner *in, __u8 ecn)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u8 tos = (in->tos & ~ECN) | ecn;

	if (in->at > HEADERS_LIMIT)
		return false;
	if (in->ip4) {
		struct ip4_header *ip = data + in->at;

		if ((void *)(ip + 1) > end)
			return false;
		/* RFC 1624; the byte is the second of its word */
		__u32 sum = (__u16)~ip->checksum + (__u16)~__builtin_bswap16(ip->tos) + __builtin_bswap16(tos);

		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		ip->checksum = ~sum;
		ip->tos = tos;
		return true;
	}
	const __u8 *ip = data + in->at;
	__u8 second;

	if ((const void *)(ip + sizeof(struct ip6_header)) > end)
		return false;
	second = (ip[1] & 0x0f) | tos << 4;
	return !bpf_skb_store_bytes(skb, in->at + 1, &second, 1, BPF_F_RECOMPUTE_CSUM);
}

/* source_port is the same for all packets of a flow inside, so that the network between
 * spreads flows and not packets. */
static __always_inline __be16 source_port(struct __sk_buff *skb)
{
	__u32 hash = bpf_get_hash_recalc(skb);

	hash ^= hash << 16; /* as udp_flow_src_port() */
	return to_be16(FIRST_SOURCE + (hash >> 18));
}

/* write_inside writes what follows the outer IP header. A UDP checksum of 0 says that
 * there is none: over IPv4 as RFC 7348 asks, over IPv6 as RFC 6935 allows for tunnels. */
static __always_inline bool write_inside(struct __sk_buff *skb, __u32 at, const struct remote *to, __u16 length,
					 __be16 source, bool ip4)
{
	struct udp_header *udp = (void *)(long)skb->data + at;
	struct vxlan_header *vxlan = (void *)(udp + 1);
	struct ethernet *frame = (void *)(vxlan + 1);
	const struct network *network = our_network();

	if (!network || (void *)(frame + 1) > (void *)(long)skb->data_end)
		return false;
	udp->source_port = source;
	udp->destination_port = network->port;
	udp->length = to_be16(length);
	udp->checksum = 0;
	vxlan->flags = VXLAN_FLAGS;
	vxlan->vni = network->vni;
	__builtin_memcpy(frame->destination, to->mac, 6);
	__builtin_memcpy(frame->source, to->own_mac, 6);
	frame->type = ip4 ? to_be16(ETHERTYPE_IP4) : to_be16(ETHERTYPE_IP6);
	return true;
}

/* short_length is a length for a header: 0 for packets that are longer than it can say,
 * which are cut up later and get their own. */
static __always_inline __u16 short_length(__u32 length)
{
	return length > 0xffff ? 0 : length;
}

static __always_inline bool wrap4(struct __sk_buff *skb, const struct remote *to, const struct inner *in)
{
	__u32 length = skb->len - ETHERNET_LENGTH + ROOM4;
	__be16 source = source_port(skb);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
		      BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_ENCAP_L2(ETHERNET_LENGTH);

	if (bpf_skb_adjust_room(skb, ROOM4, BPF_ADJ_ROOM_MAC, flags))
		return false;
	struct ethernet *frame = (void *)(long)skb->data;
	struct ip4_header *ip = (void *)(frame + 1);

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return false;
	frame->type = to_be16(ETHERTYPE_IP4);
	ip->version_length = 0x45;
	ip->tos = in->tos;
	ip->length = to_be16(short_length(length));
	ip->id = bpf_get_prandom_u32(); /* it may be fragmented (RFC 6864, 4.1) */
	ip->fragment = 0;
	ip->ttl = OUTER_HOPS;
	ip->protocol = IPPROTO_UDP;
	ip->source = to->local.word[3];
	ip->destination = to->vtep.word[3];
	__u32 sum = __builtin_bswap16(0x4500 | in->tos) + (__u32)ip->length + ip->id +
		    __builtin_bswap16(OUTER_HOPS << 8 | IPPROTO_UDP);

	sum += (ip->source & 0xffff) + (ip->source >> 16);
	sum += (ip->destination & 0xffff) + (ip->destination >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	ip->checksum = ~sum;
	return write_inside(skb, ETHERNET_LENGTH + sizeof(*ip), to, short_length(length - sizeof(*ip)), source,
			    in->ip4);
}

static __always_inline bool wrap6(struct __sk_buff *skb, const struct remote *to, const struct inner *in)
{
	__u32 length = skb->len - ETHERNET_LENGTH + INSIDE_LENGTH;
	__be16 source = source_port(skb);
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
		      BPF_F_ADJ_ROOM_ENCAP_L2_ETH | BPF_F_ADJ_ROOM_ENCAP_L2(ETHERNET_LENGTH);

	if (bpf_skb_adjust_room(skb, ROOM6, BPF_ADJ_ROOM_MAC, flags))
		return false;
	struct ethernet *frame = (void *)(long)skb->data;
	struct ip6_header *ip = (void *)(frame + 1);

	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return false;
	frame->type = to_be16(ETHERTYPE_IP6);
	ip->version_class_flow = __builtin_bswap32(0x60000000 | in->tos << 20);
	ip->length = to_be16(short_length(length));
	ip->next = IPPROTO_UDP;
	ip->hops = OUTER_HOPS;
	ip->source = to->local;
	ip->destination = to->vtep;
	return write_inside(skb, ETHERNET_LENGTH + sizeof(*ip), to, short_length(length), source, in->ip4);
}

/* to_uplink gives what the packet is now to the uplink. */
static __always_inline int to_uplink(const struct remote *to)
{
	if (!to->near)
		return bpf_redirect_neigh(to->uplink, 0, 0, 0);
	struct bpf_redir_neigh hop = { .nh_family = AF_INET6 };

	__builtin_memcpy(hop.next_hop, &to->vtep, sizeof(hop.next_hop));
	if (to->ip4) {
		hop.nh_family = AF_INET;
		hop.next_hop[0] = to->vtep.word[3];
	}
	return bpf_redirect_neigh(to->uplink, &hop, sizeof(hop), 0);
}

/* send puts the packet into one to the other node, and gives that to the uplink. The
 * congestion bits outside are those inside (RFC 6040, 4.1, normal mode), and so is the
 * class of service (RFC 2983, 3). */
static __always_inline int send(struct __sk_buff *skb, const struct remote *to, const struct inner *in,
				enum outcome outcome)
{
	if (to->ip4 ? !wrap4(skb, to, in) : !wrap6(skb, to, in))
		return finish(OUTCOME_UNWRITABLE, TC_ACT_UNSPEC);
	count(outcome);
	return to_uplink(to);
}

static __always_inline const struct remote *remote_of(const struct address *address)
{
	struct range key = { .length = 128, .address = *address };

	return bpf_map_lookup_elem(&remotes, &key);
}

/* ask asks the node's routes and neighbours for the way of a packet that long. */
static __always_inline long ask(struct __sk_buff *skb, const struct inner *in, const struct address *from,
				const struct address *to, __u32 length, struct bpf_fib_lookup *way)
{
	way->l4_protocol = in->protocol;
	way->tot_len = length;
	if (in->ip4) {
		way->family = AF_INET;
		way->source[0] = from->word[3];
		way->destination[0] = to->word[3];
	} else {
		way->family = AF_INET6;
		__builtin_memcpy(way->source, from, sizeof(way->source));
		__builtin_memcpy(way->destination, to, sizeof(way->destination));
	}
	return bpf_fib_lookup(skb, way, sizeof(*way), 0);
}

/* leads_back says whether the node's routes lead to the address that a packet comes from by
 * the device by which it came. A function of its own, so that pods that are in homes pay
 * nothing for it. */
static __noinline bool leads_back(struct __sk_buff *skb, const struct inner *in)
{
	struct bpf_fib_lookup way = { .ifindex = skb->ifindex };
	long answer = ask(skb, in, &in->destination, &in->source, 1, &way);

	return (answer == BPF_FIB_LKUP_RET_SUCCESS || answer == BPF_FIB_LKUP_RET_NO_NEIGH) &&
	       way.ifindex == skb->ifindex;
}

/* is_senders says whether the address that a packet comes from is that of the pod behind
 * the device: what the stack asks with strict rp_filter. */
static __always_inline bool is_senders(struct __sk_buff *skb, const struct inner *in)
{
	struct home *home = bpf_map_lookup_elem(&homes, &in->source);

	return home ? home->device == skb->ifindex : leads_back(skb, in);
}

/* read_from_pod is read_inner for a packet of a pod, which may keep its headers out of the
 * linear part. */
static __always_inline bool read_from_pod(struct __sk_buff *skb, struct inner *in)
{
	return read_inner(skb, ETHERNET_LENGTH, skb->protocol, in) ||
	       (!bpf_skb_pull_data(skb, skb->len < READ_AHEAD ? skb->len : READ_AHEAD) &&
		read_inner(skb, ETHERNET_LENGTH, skb->protocol, in));
}

/* may_be_to_port says whether a packet that has more before its UDP header than most, or
 * keeps that out of the linear part, is to the port of VXLAN, or has more headers before it
 * than any stack sends. Of fragments the first is enough: without it they are never put
 * together. A function of its own, as leads_back. */
static __noinline bool may_be_to_port(struct __sk_buff *skb, const struct inner *in)
{
	struct walk walk = { .at = in->at + in->header, .shape = SHAPE_WHOLE, .next = in->protocol };
	const struct network *network;
	__be16 to = 0;

	if (!in->ip4)
		extensions(skb, &walk);
	else if (!bpf_skb_load_bytes(skb, in->at + __builtin_offsetof(struct ip4_header, fragment), &to, sizeof(to)) &&
		 from_be16(to) & IP4_FRAGMENT_OFFSET)
		return false;
	if (walk.shape == SHAPE_LATER)
		return false;
	if (!in->ip4 && (walk.shape == SHAPE_OTHER || walk.at > HEADERS_LIMIT || is_extension(walk.next)))
		return true;
	if (walk.next != IPPROTO_UDP || walk.at > HEADERS_LIMIT ||
	    bpf_skb_load_bytes(skb, walk.at + __builtin_offsetof(struct udp_header, destination_port), &to, sizeof(to)))
		return false;
	network = our_network();
	return network && to == network->port;
}

/* is_to_port says whether a packet of a pod may be UDP to the port of VXLAN. */
static __always_inline bool is_to_port(struct __sk_buff *skb, const struct inner *in)
{
	void *ip = (void *)(long)skb->data + ETHERNET_LENGTH, *end = (void *)(long)skb->data_end;
	const struct udp_header *udp4 = ip + sizeof(struct ip4_header), *udp6 = ip + sizeof(struct ip6_header);
	const struct network *network;

	if (in->protocol == IPPROTO_TCP)
		return false;
	network = our_network();
	if (!network)
		return false;
	if (in->protocol == IPPROTO_UDP && in->ip4 && in->header == sizeof(struct ip4_header) &&
	    (const void *)(udp4 + 1) <= end)
		return udp4->destination_port == network->port &&
		       !(from_be16(((const struct ip4_header *)ip)->fragment) & IP4_FRAGMENT_OFFSET);
	if (in->protocol == IPPROTO_UDP && !in->ip4 && (const void *)(udp6 + 1) <= end)
		return udp6->destination_port == network->port;
	return may_be_to_port(skb, in);
}

/* forges says whether a pod sends VXLAN to a node, or in a node's name. The packet inside
 * could be of any pod, and a node that gets it by masquerading (RFC 3022) would take it for
 * one of ours. */
static __always_inline bool forges(struct __sk_buff *skb, const struct inner *in)
{
	return is_to_port(skb, in) &&
	       (bpf_map_lookup_elem(&vteps, &in->destination) || bpf_map_lookup_elem(&vteps, &in->source));
}

/* A policy about what the pod may send has to be decided here, before the packet is given
 * away: nothing on the node sees it afterwards but what is at the uplink. */
SEC("tcx/ingress")
int route_from_pod(struct __sk_buff *skb)
{
	const struct remote *to;
	struct inner in;

	if (!is_for_router(skb) || !read_from_pod(skb, &in))
		return TC_ACT_UNSPEC;
	if (forges(skb, &in))
		return finish(OUTCOME_STRANGER, TC_ACT_SHOT);
	to = remote_of(&in.destination);
	if (!to)
		return TC_ACT_UNSPEC;
	if (!is_open() || !is_senders(skb, &in) || (to->direct && has_options(&in)))
		return finish(OUTCOME_STACK, TC_ACT_UNSPEC);
	if (in.hops <= 1)
		return finish(OUTCOME_EXPIRED, TC_ACT_UNSPEC);
	if (longest(skb, &in) > to->mtu)
		return finish(OUTCOME_TOO_BIG, TC_ACT_UNSPEC);
	if (!age(skb, in.at, in.ip4))
		return TC_ACT_UNSPEC;
	if (!to->direct)
		return send(skb, to, &in, OUTCOME_SENT);
	count(OUTCOME_SENT_DIRECT);
	return to_uplink(to);
}

/* What the stack sends to other nodes' pods leaves by our vxlan device; it has seen to
 * lengths and hops. */
SEC("tcx/egress")
int route_to_remote(struct __sk_buff *skb)
{
	const struct remote *to;
	struct inner in;

	if (!read_inner(skb, ETHERNET_LENGTH, skb->protocol, &in))
		return TC_ACT_UNSPEC;
	to = remote_of(&in.destination);
	if (!to || to->direct)
		return TC_ACT_UNSPEC;
	return send(skb, to, &in, OUTCOME_SENT_STACK);
}

/* A packet of VXLAN. */
struct outer {
	struct address source;
	struct address destination;
	__u32 inner; /* offset of the packet inside */
	__u8 tos;
	bool ip4;
	__u8 mac[6]; /* whom the frame inside is for */
	__be16 type; /* what that holds */
};

/* is_vxlan says whether a UDP header, to a port, is followed by a packet of our network.
 * What the linear part does not have is brought there. */
static __always_inline bool is_vxlan(struct __sk_buff *skb, __u32 at, __be16 port, struct outer *out)
{
	const struct network *network = our_network();
	__u32 need = at + INSIDE_LENGTH + sizeof(struct ip4_header);

	if (!network || port != network->port || skb->len < need)
		return false;
	if ((void *)(long)skb->data + need > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, skb->len < READ_AHEAD ? skb->len : READ_AHEAD))
		return false;
	const struct udp_header *udp = (void *)(long)skb->data + at;
	const struct vxlan_header *vxlan = (const void *)(udp + 1);
	const struct ethernet *frame = (const void *)(vxlan + 1);

	if ((const void *)(frame + 1) > (void *)(long)skb->data_end || (vxlan->flags & 0xff) != VXLAN_FLAGS ||
	    vxlan->vni != network->vni)
		return false;
	__builtin_memcpy(out->mac, frame->destination, 6);
	out->type = frame->type;
	out->inner = at + INSIDE_LENGTH;
	return true;
}

/* read_outer says whether a packet is one of our network: few instructions for all that
 * is no UDP. Fragments are put together by the stack. */
static __always_inline bool read_outer(struct __sk_buff *skb, struct outer *out)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const struct udp_header *udp;

	if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP4)) {
		const struct ip4_header *ip = data + ETHERNET_LENGTH;

		udp = (const void *)(ip + 1);
		if ((const void *)(udp + 1) > end || ip->version_length != 0x45 || ip->protocol != IPPROTO_UDP ||
		    from_be16(ip->fragment) & (IP4_MORE_FRAGMENTS | IP4_FRAGMENT_OFFSET))
			return false;
		out->ip4 = true;
		out->source = address_from_ip4(ip->source);
		out->destination = address_from_ip4(ip->destination);
		out->tos = ip->tos;
		return is_vxlan(skb, ETHERNET_LENGTH + sizeof(*ip), udp->destination_port, out);
	}
	if (skb->protocol == __builtin_bswap16(ETHERTYPE_IP6)) {
		const struct ip6_header *ip = data + ETHERNET_LENGTH;
		const __u8 *first = (const void *)ip;

		udp = (const void *)(ip + 1);
		if ((const void *)(udp + 1) > end || first[0] >> 4 != 6 || ip->next != IPPROTO_UDP)
			return false;
		out->ip4 = false;
		out->source = ip->source;
		out->destination = ip->destination;
		out->tos = first[0] << 4 | first[1] >> 4;
		return is_vxlan(skb, ETHERNET_LENGTH + sizeof(*ip), udp->destination_port, out);
	}
	return false;
}

/* congestion brings what routers have said outside to the packet inside (RFC 6040, 4.2,
 * figure 4). False if that cannot be. */
static __always_inline bool congestion(struct __sk_buff *skb, const struct outer *out, const struct inner *in)
{
	__u8 outside = out->tos & ECN, inside = in->tos & ECN;

	if (outside == ECN_CE)
		return inside && (inside == ECN_CE || mark(skb, in, ECN_CE));
	if (outside == ECN_ECT1 && inside == ECN_ECT0)
		return mark(skb, in, ECN_ECT1);
	return true;
}

/* unwrap takes away what is outside; the Ethernet header stays. The checksum that the
 * device has verified was the outer one. */
static __always_inline bool unwrap(struct __sk_buff *skb, const struct outer *out, const struct inner *in,
				   const __u8 *ethernet)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	long refused;

	if (can_relabel)
		flags |= in->ip4 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV4 : BPF_F_ADJ_ROOM_DECAP_L3_IPV6;
	if (out->ip4)
		refused = bpf_skb_adjust_room(skb, -ROOM4, BPF_ADJ_ROOM_MAC, flags);
	else
		refused = bpf_skb_adjust_room(skb, -ROOM6, BPF_ADJ_ROOM_MAC, flags);
	if (refused)
		return false;
	bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	struct ethernet *frame = (void *)(long)skb->data;

	if ((void *)(frame + 1) > (void *)(long)skb->data_end)
		return false;
	__builtin_memcpy(frame, ethernet, sizeof(frame->destination) + sizeof(frame->source));
	frame->type = out->type;
	return true;
}

/* Where a pod of this node is. */
struct door {
	__u32 device;      /* the node's end */
	__u8 ethernet[12]; /* what frames to it begin with */
	bool direct;       /* nothing has to run at the device */
};

/* ask_door finds a pod by the node's routes and neighbours: one of another network plug-in.
 * A function of its own, as leads_back. */
static __noinline bool ask_door(struct __sk_buff *skb, const struct inner *in, __u32 device, struct door *door)
{
	struct bpf_fib_lookup way = { .ifindex = device };
	__u32 length = longest(skb, in);

	if (ask(skb, in, &in->source, &in->destination, length, &way) != BPF_FIB_LKUP_RET_SUCCESS ||
	    !bpf_map_lookup_elem(&ports, &way.ifindex))
		return false;
	door->device = way.ifindex;
	door->direct = to_peer;
	__builtin_memcpy(door->ethernet, way.dmac, 6);
	__builtin_memcpy(door->ethernet + 6, way.smac, 6);
	return true;
}

/* find_door says where the pod is that a packet is for. False where there is none, and
 * where the packet is too long for it. */
static __always_inline bool find_door(struct __sk_buff *skb, const struct inner *in, __u32 device, struct door *door)
{
	struct home *home = bpf_map_lookup_elem(&homes, &in->destination);

	if (!home)
		return ask_door(skb, in, device, door);
	door->device = home->device;
	door->direct = home->direct;
	__builtin_memcpy(door->ethernet, home->ethernet, sizeof(door->ethernet));
	return longest(skb, in) <= home->mtu;
}

/* hand_over gives the packet to a pod. A policy about what the pod may get has to be
 * decided before: nothing on the node sees it afterwards. */
static __always_inline int hand_over(const struct door *door, enum outcome outcome)
{
	count(outcome);
	return door->direct ? bpf_redirect_peer(door->device, 0) : bpf_redirect(door->device, 0);
}

/* to_stack gives the packet to the node's stack, as if it had come by our vxlan device,
 * which learns the family from the frame. */
static __always_inline int to_stack(struct __sk_buff *skb, const struct outer *out, const struct inner *in,
				    const struct vtep *here)
{
	__u32 device = here->device;
	__u8 ethernet[12];

	__builtin_memcpy(ethernet, here->mac, 6);
	__builtin_memcpy(ethernet + 6, out->mac, 6);
	if (!unwrap(skb, out, in, ethernet))
		return finish(OUTCOME_UNWRITABLE, TC_ACT_UNSPEC);
	return finish(OUTCOME_TAKEN_STACK, bpf_redirect(device, BPF_F_INGRESS));
}

static __always_inline bool same_mac(const __u8 *a, const __u8 *b)
{
	bool same = true;

#pragma unroll
	for (int i = 0; i < 6; i++)
		same &= a[i] == b[i];
	return same;
}

/* take takes a packet of VXLAN apart that is for this node. */
static __always_inline int take(struct __sk_buff *skb, const struct outer *out, const struct vtep *here)
{
	const struct vtep *there = bpf_map_lookup_elem(&vteps, &out->source);
	struct door door;
	struct inner in;

	if (!there || there->device)
		return finish(OUTCOME_STRANGER, TC_ACT_SHOT);
	if (!read_inner(skb, out->inner, out->type, &in))
		return TC_ACT_UNSPEC;
	if (!congestion(skb, out, &in))
		return finish(OUTCOME_CONGESTED, TC_ACT_SHOT);
	if (!is_open() || in.hops <= 1 || (!can_relabel && out->ip4 != in.ip4) ||
	    !find_door(skb, &in, here->device, &door))
		return to_stack(skb, out, &in, here);
	if (!age(skb, in.at, in.ip4) || !unwrap(skb, out, &in, door.ethernet))
		return finish(OUTCOME_UNWRITABLE, TC_ACT_UNSPEC);
	bpf_skb_change_type(skb, PACKET_HOST);
	return hand_over(&door, OUTCOME_TAKEN);
}

/* forward hands a packet to a pod of this node that comes from one of a node on the
 * segment, by the device that leads back there. Everything else goes on to the stack: what
 * is for the node, what comes from outside the cluster, and what is to be answered. */
static __always_inline int forward(struct __sk_buff *skb)
{
	const struct remote *from;
	struct door door;
	struct inner in;

	if (!is_open() || !is_for_router(skb) || !read_inner(skb, ETHERNET_LENGTH, skb->protocol, &in))
		return TC_ACT_UNSPEC;
	from = remote_of(&in.source);
	if (!from || !from->direct || from->uplink != skb->ifindex || has_options(&in) || in.hops <= 1 ||
	    !find_door(skb, &in, skb->ifindex, &door))
		return TC_ACT_UNSPEC;
	if (!age(skb, in.at, in.ip4) || !readdress(skb, door.ethernet))
		return TC_ACT_SHOT; /* half rewritten: never seen */
	return hand_over(&door, OUTCOME_TAKEN_DIRECT);
}

SEC("tcx/ingress")
int route_from_wire(struct __sk_buff *skb)
{
	const struct vtep *here;
	struct outer out;

	if (!read_outer(skb, &out))
		return forward(skb);
	here = bpf_map_lookup_elem(&vteps, &out.destination);
	if (!here || !here->device || !same_mac(out.mac, here->mac))
		return forward(skb);
	return take(skb, &out, here);
}

#define EINVAL             22
#define EPROTO             71
#define BPF_F_TUNINFO_IPV6 1

/* What the kernel tells of the packet outside. The rest is of Linux 5.18, and may be left
 * out. */
struct bpf_tunnel_key {
	__u32 tunnel_id;
	union {
		__u32 remote_ipv4; /* in this machine's order */
		__be32 remote_ipv6[4];
	};
	__u8 tunnel_tos;
	__u8 tunnel_ttl;
	__u16 tunnel_ext;
	__u32 tunnel_label;
};

/* sender_of reads who sent the VXLAN that the kernel took a packet out of. 0, or an error:
 * -EINVAL where it came by none. */
static __always_inline long sender_of(struct __sk_buff *skb, struct bpf_tunnel_key *key, struct address *sender)
{
	long refused = bpf_skb_get_tunnel_key(skb, key, sizeof(*key), 0);

	*sender = address_from_ip4(__builtin_bswap32(key->remote_ipv4));
	if (refused != -EPROTO)
		return refused;
	refused = bpf_skb_get_tunnel_key(skb, key, sizeof(*key), BPF_F_TUNINFO_IPV6);
	__builtin_memcpy(sender, key->remote_ipv6, sizeof(*sender));
	return refused;
}

/* What the kernel takes out of VXLAN comes in by our device: what came in fragments, with
 * options, to another address of the node or by a device without route_from_wire. Its
 * socket asks nobody who sends. What came by none is from to_stack, which has. */
SEC("tcx/ingress")
int route_unwrapped(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};
	struct address sender;
	const struct network *network = our_network();
	const struct vtep *there;
	long refused = sender_of(skb, &key, &sender);

	if (refused == -EINVAL)
		return TC_ACT_UNSPEC;
	there = bpf_map_lookup_elem(&vteps, &sender);
	if (refused || !network || key.tunnel_id != __builtin_bswap32(network->vni) >> 8 || !there || there->device)
		return finish(OUTCOME_STRANGER, TC_ACT_SHOT);
	return TC_ACT_UNSPEC;
}

char __license[] SEC("license") = "Dual MIT/GPL";
