/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* One reading of a packet for both families: who sends it to whom, and where in
 * it that is written. Everything that follows works on struct packet.
 *
 * Read are TCP and UDP over IPv4 (RFC 791) and IPv6 (RFC 8200) with options and
 * extension headers, fragments, and ICMP errors (RFC 792, RFC 4443) together with
 * the packet they are about. Anything else is SHAPE_OTHER.
 */
#pragma once

#include "address.h"

#define IPPROTO_ICMP   1
#define IPPROTO_TCP    6
#define IPPROTO_UDP    17
#define IPPROTO_ICMPV6 58

/* Who sends to whom, as it is written in the packet. */
struct tuple {
	struct address source;
	struct address destination;
	__be16 source_port;
	__be16 destination_port;
	__u8 protocol;
	__u8 zero[3];
};

enum shape {
	SHAPE_OTHER,      /* not for us: ARP, ICMP queries, IPsec, what is malformed */
	SHAPE_WHOLE,      /* tuple is whole */
	SHAPE_FIRST,      /* a first fragment: tuple is whole, the payload is not */
	SHAPE_LATER,      /* a later fragment: no ports */
	SHAPE_ERROR,      /* an ICMP error: tuple is that of the packet it is about */
	SHAPE_UNREADABLE, /* the headers lie behind the linear part of the buffer */
};

enum {
	TCP_FIN = 0x01,
	TCP_SYN = 0x02,
	TCP_RST = 0x04,
	TCP_ACK = 0x10,
};

struct packet {
	struct tuple tuple;
	struct address outer_source;      /* SHAPE_ERROR: who sends the error */
	struct address outer_destination; /* SHAPE_ERROR: who gets it */
	__u32 fragment;                   /* SHAPE_FIRST, SHAPE_LATER: the datagram's number */
	__u16 network;                    /* offset of the IP header with the addresses of tuple */
	__u16 transport;                  /* offset of the header after it; 0 in SHAPE_LATER */
	__u16 outer_network;              /* SHAPE_ERROR: offset of the first IP header */
	__u16 icmp;                       /* SHAPE_ERROR: offset of the ICMP header */
	enum shape shape;
	__u8 ip4;
	__u8 tcp_flags;
	__u8 frame; /* what stands before the IP packet: ETHERNET_LENGTH, or 0 */
	__u8 zero;
};

#define ETHERNET_LENGTH 14
#define ETHERTYPE_IP4   0x0800
#define ETHERTYPE_IP6   0x86dd

struct ip4_header {
	__u8 version_length;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__be32 source;
	__be32 destination;
};

struct ip6_header {
	__be32 version_class_flow;
	__be16 length;
	__u8 next;
	__u8 hops;
	struct address source;
	struct address destination;
};

/* Extension headers that may stand before the transport header (RFC 8200, 4.1). */
enum {
	IP6_HOP_BY_HOP = 0,
	IP6_ROUTING = 43,
	IP6_FRAGMENT = 44,
	IP6_AUTHENTICATION = 51,
	IP6_DESTINATION = 60,
};

/* RFC 8200 names seven; no stack sends more. */
#define IP6_EXTENSIONS 8

#define IP4_MORE_FRAGMENTS  0x2000
#define IP4_FRAGMENT_OFFSET 0x1fff
#define IP6_MORE_FRAGMENTS  0x0001
#define IP6_FRAGMENT_OFFSET 0xfff8

/* A header longer than this is malformed; it bounds offsets for the verifier. */
#define HEADERS_LIMIT 1024

static __always_inline __u16 from_be16(__be16 value)
{
	return __builtin_bswap16(value);
}

/* network_header reads addresses, protocol and fragment of the IP header at
 * offset at, and returns the offset of what follows it; 0 if it is not readable
 * (SHAPE_UNREADABLE in p->shape) or not for us (SHAPE_OTHER). */
static __always_inline __u32 ip4_header(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	const struct ip4_header *ip = (void *)(long)skb->data + at;

	p->shape = SHAPE_UNREADABLE;
	if ((const void *)(ip + 1) > (void *)(long)skb->data_end)
		return 0;
	__u32 length = (ip->version_length & 0x0f) * 4;
	__u16 fragment = from_be16(ip->fragment);

	p->shape = SHAPE_OTHER;
	if (ip->version_length >> 4 != 4 || length < sizeof(*ip))
		return 0;
	p->ip4 = 1;
	p->network = at;
	p->tuple.source = address_from_ip4(ip->source);
	p->tuple.destination = address_from_ip4(ip->destination);
	p->tuple.protocol = ip->protocol;
	p->fragment = ip->id;
	p->shape = SHAPE_WHOLE;
	if (fragment & IP4_FRAGMENT_OFFSET)
		p->shape = SHAPE_LATER;
	else if (fragment & IP4_MORE_FRAGMENTS)
		p->shape = SHAPE_FIRST;
	return at + length;
}

/* Where the walk over extension headers is. */
struct walk {
	__u32 at;
	__u32 fragment;
	enum shape shape;
	__u8 next;
	__u8 zero[3];
};

static __always_inline bool is_extension(__u8 next)
{
	return next == IP6_HOP_BY_HOP || next == IP6_ROUTING || next == IP6_DESTINATION || next == IP6_FRAGMENT ||
	       next == IP6_AUTHENTICATION;
}

/* extensions walks over IPv6 extension headers to what follows them. It copies
 * them, so that the verifier need not follow every sum of lengths; few packets
 * have any. A global function, so that it is verified once. */
__noinline int extensions(struct __sk_buff *skb, struct walk *walk)
{
	__u8 head[8];

	if (!walk)
		return 0;
	for (int i = 0; i < IP6_EXTENSIONS && is_extension(walk->next); i++) {
		if (walk->at > HEADERS_LIMIT || bpf_skb_load_bytes(skb, walk->at, head, sizeof(head))) {
			walk->shape = SHAPE_OTHER;
			return 0;
		}
		if (walk->next == IP6_FRAGMENT) {
			__u16 fragment = head[2] << 8 | head[3];

			__builtin_memcpy(&walk->fragment, head + 4, 4);
			if (fragment & IP6_FRAGMENT_OFFSET)
				walk->shape = SHAPE_LATER;
			else if (fragment & IP6_MORE_FRAGMENTS)
				walk->shape = SHAPE_FIRST;
			walk->at += 8;
		} else if (walk->next == IP6_AUTHENTICATION) {
			walk->at += (head[1] + 2) * 4; /* RFC 4302, 2.2 */
		} else {
			walk->at += (head[1] + 1) * 8;
		}
		walk->next = head[0];
		if (walk->shape == SHAPE_LATER) /* what follows is payload */
			break;
	}
	return 0;
}

static __always_inline __u32 ip6_header(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	const struct ip6_header *ip = (void *)(long)skb->data + at;

	p->shape = SHAPE_UNREADABLE;
	if ((const void *)(ip + 1) > (void *)(long)skb->data_end)
		return 0;
	p->shape = SHAPE_OTHER;
	if ((*(const __u8 *)ip) >> 4 != 6)
		return 0;
	p->ip4 = 0;
	p->network = at;
	p->tuple.source = ip->source;
	p->tuple.destination = ip->destination;
	p->tuple.protocol = ip->next;
	p->shape = SHAPE_WHOLE;
	at += sizeof(*ip);
	if (!is_extension(p->tuple.protocol))
		return at;

	struct walk walk = { .at = at, .shape = SHAPE_WHOLE, .next = p->tuple.protocol };

	extensions(skb, &walk);
	p->shape = walk.shape;
	p->fragment = walk.fragment;
	p->tuple.protocol = walk.next;
	if (walk.at > HEADERS_LIMIT)
		p->shape = SHAPE_OTHER;
	return p->shape == SHAPE_OTHER ? 0 : walk.at;
}

/* transport_header reads ports and flags at offset at. */
static __always_inline void transport_header(struct __sk_buff *skb, __u32 at, struct packet *p, bool inner)
{
	const void *end = (void *)(long)skb->data_end;
	const __be16 *ports = (void *)(long)skb->data + at;
	/* an ICMP error need not hold more than eight bytes of what it is about */
	__u32 need = !inner && p->tuple.protocol == IPPROTO_TCP ? 20 : 8;

	if (p->tuple.protocol != IPPROTO_TCP && p->tuple.protocol != IPPROTO_UDP) {
		p->shape = SHAPE_OTHER;
		return;
	}
	if (p->shape == SHAPE_LATER) {
		if (at > skb->len) /* its options are cut off */
			p->shape = SHAPE_OTHER;
		return;
	}
	if ((const void *)ports + need > end || (const void *)ports + 8 > end) {
		p->shape = SHAPE_UNREADABLE;
		return;
	}
	p->transport = at;
	p->tuple.source_port = ports[0];
	p->tuple.destination_port = ports[1];
	if (need == 20 && (const void *)ports + 20 <= end)
		p->tcp_flags = ((const __u8 *)ports)[13];
}

/* ICMP errors: those that hold a packet (RFC 792; RFC 4443, 2.1). */
static __always_inline bool icmp_is_error(__u8 type, bool ip4)
{
	return ip4 ? type == 3 || type == 11 || type == 12 : type >= 1 && type <= 4;
}

/* icmp_error reads the packet that an ICMP error at offset at is about. */
static __always_inline void icmp_error(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	const __u8 *icmp = (void *)(long)skb->data + at;

	if (p->shape != SHAPE_WHOLE) { /* errors are not fragmented */
		p->shape = SHAPE_OTHER;
		return;
	}
	if ((const void *)(icmp + 8) > (void *)(long)skb->data_end) {
		p->shape = SHAPE_UNREADABLE;
		return;
	}
	bool ip4 = p->ip4;

	if (!icmp_is_error(icmp[0], ip4)) {
		p->shape = SHAPE_OTHER;
		return;
	}
	p->icmp = at;
	p->outer_network = p->network;
	p->outer_source = p->tuple.source;
	p->outer_destination = p->tuple.destination;
	at = ip4 ? ip4_header(skb, at + 8, p) : ip6_header(skb, at + 8, p);
	if (!at)
		return;
	if (p->shape == SHAPE_LATER) {
		p->shape = SHAPE_OTHER; /* it does not say what it is about */
		return;
	}
	transport_header(skb, at, p, true);
	if (p->shape == SHAPE_WHOLE || p->shape == SHAPE_FIRST)
		p->shape = SHAPE_ERROR;
}

/* ethertype of a packet with so much before its IP header; 0 if it is not readable. */
static __always_inline __be16 ethertype_of(struct __sk_buff *skb, __u32 frame)
{
	const __be16 *ethertype = (void *)(long)skb->data + 12;

	if (!frame)
		return skb->protocol;
	return (const void *)(ethertype + 1) > (void *)(long)skb->data_end ? 0 : *ethertype;
}

/* parse reads a packet as far as it lies in the linear part of the buffer. */
static __always_inline void parse(struct __sk_buff *skb, struct packet *p, __u32 frame)
{
	__be16 ethertype = ethertype_of(skb, frame);
	__u32 at;

	p->frame = frame;
	p->shape = SHAPE_UNREADABLE;
	if (!ethertype)
		return;
	if (ethertype == __builtin_bswap16(ETHERTYPE_IP4)) {
		at = ip4_header(skb, frame, p);
	} else if (ethertype == __builtin_bswap16(ETHERTYPE_IP6)) {
		at = ip6_header(skb, frame, p);
	} else {
		p->shape = SHAPE_OTHER;
		return;
	}
	if (!at)
		return;
	if (p->tuple.protocol == (p->ip4 ? IPPROTO_ICMP : IPPROTO_ICMPV6))
		icmp_error(skb, at, p);
	else
		transport_header(skb, at, p, false);
}

/* How much is brought into the linear part where headers lie behind it. */
#define READ_AHEAD 256

/* read_packet reads a packet at tc, of a device whose packets have so much before the
 * IP header. What cannot be read is SHAPE_OTHER. */
static __always_inline void read_packet(struct __sk_buff *skb, struct packet *p, __u32 frame)
{
	__builtin_memset(p, 0, sizeof(*p));
	parse(skb, p, frame);
	if (p->shape != SHAPE_UNREADABLE)
		return;
	if (!bpf_skb_pull_data(skb, skb->len < READ_AHEAD ? skb->len : READ_AHEAD)) {
		__builtin_memset(p, 0, sizeof(*p));
		parse(skb, p, frame);
	}
	if (p->shape == SHAPE_UNREADABLE)
		p->shape = SHAPE_OTHER;
}
