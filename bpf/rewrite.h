/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Writing other addresses and ports into a packet that was read by packet.h,
 * with all checksums (RFC 1624). For programs at tc.
 */
#pragma once

#include "packet.h"

#define TCP_CHECKSUM  16
#define UDP_CHECKSUM  6
#define ICMP_CHECKSUM 2
#define IP4_CHECKSUM  10

/* sum_replaced adds to a ones' complement sum what changes when words become
 * others. IPv4 addresses differ in one word of four, so the rest falls out. */
static __always_inline __u64 sum_replaced(__u64 sum, const struct address *from, const struct address *to)
{
#pragma unroll
	for (int i = 0; i < 4; i++)
		sum += (__u64)(__u32)~from->word[i] + to->word[i];
	return sum;
}

static __always_inline __u64 sum_words(__u64 sum, const struct address *of)
{
	return sum + of->word[0] + of->word[1] + of->word[2] + of->word[3];
}

static __always_inline __u32 ports_of(const struct tuple *t)
{
	return (__u32)t->destination_port << 16 | t->source_port;
}

/* fold brings a sum to 32 bits, as bpf_l4_csum_replace() wants it. */
static __always_inline __u32 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	return (sum & 0xffffffff) + (sum >> 32);
}

static __always_inline __u16 fold16(__u64 sum)
{
	__u32 folded = fold(sum);

	folded = (folded & 0xffff) + (folded >> 16);
	return (folded & 0xffff) + (folded >> 16);
}

/* rewrite_ip writes the addresses of the IP header at offset at, and its
 * checksum. */
static __always_inline bool rewrite_ip(struct __sk_buff *skb, __u32 at, bool ip4, const struct address *source,
				       const struct address *destination)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (at > HEADERS_LIMIT)
		return false;
	if (ip4) {
		struct ip4_header *ip = data + at;

		if ((void *)(ip + 1) > end)
			return false;
		__u64 sum = (__u16)~ip->checksum;

		sum += (__u64)(__u32)~ip->source + source->word[3];
		sum += (__u64)(__u32)~ip->destination + destination->word[3];
		ip->checksum = ~fold16(sum);
		ip->source = source->word[3];
		ip->destination = destination->word[3];
		return true;
	}
	struct ip6_header *ip = data + at;

	if ((void *)(ip + 1) > end)
		return false;
	ip->source = *source;
	ip->destination = *destination;
	return true;
}

static __always_inline bool rewrite_ports(struct __sk_buff *skb, __u32 at, const struct tuple *to)
{
	__be16 *ports = (void *)(long)skb->data + at;

	if (at > HEADERS_LIMIT + 60 || (void *)(ports + 2) > (void *)(long)skb->data_end)
		return false;
	ports[0] = to->source_port;
	ports[1] = to->destination_port;
	return true;
}

/* rewrite makes a packet or fragment come from to->source and go to
 * to->destination. The checksum first: its helper knows whether the device or the
 * program computes it, and makes the headers writable. */
static __always_inline bool rewrite(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	const struct tuple *from = &p->tuple;

	if (p->shape != SHAPE_LATER) {
		__u32 at = p->transport + (from->protocol == IPPROTO_TCP ? TCP_CHECKSUM : UDP_CHECKSUM);
		/* a UDP checksum of 0 means that there is none (RFC 768) */
		__u64 flags = from->protocol == IPPROTO_TCP ? 0 : BPF_F_MARK_MANGLED_0;
		__u64 sum = sum_replaced(0, &from->source, &to->source);

		sum = sum_replaced(sum, &from->destination, &to->destination);
		if (bpf_l4_csum_replace(skb, at, 0, fold(sum), flags | BPF_F_PSEUDO_HDR))
			return false;
		if (ports_of(from) != ports_of(to)) {
			sum = (__u64)(__u32)~ports_of(from) + ports_of(to);
			if (bpf_l4_csum_replace(skb, at, 0, fold(sum), flags))
				return false;
			if (!rewrite_ports(skb, p->transport, to))
				return false;
		}
	}
	return rewrite_ip(skb, p->network, p->ip4, &to->source, &to->destination);
}

/* rewrite_error does the same to the packet inside an ICMP error, and gives the
 * error itself other addresses. The checksum of the inner TCP or UDP header is
 * left: nobody checks it, for the payload may be cut off (RFC 5508, 4.2, REQ-4
 * asks for the addresses, ports and the IP header's checksum). */
static __noinline bool rewrite_error(struct __sk_buff *skb, const struct packet *p, const struct tuple *to,
				     const struct address *source, const struct address *destination)
{
	const struct tuple *from = &p->tuple;
	__u64 sum = (__u64)(__u32)~ports_of(from) + ports_of(to);

	/* The words of an IPv4 header and its checksum cancel out. */
	if (!p->ip4) {
		sum = sum_replaced(sum, &from->source, &to->source);
		sum = sum_replaced(sum, &from->destination, &to->destination);
	}
	if (bpf_l4_csum_replace(skb, p->icmp + ICMP_CHECKSUM, 0, fold(sum), 0))
		return false;
	if (!p->ip4) { /* ICMPv6 has a pseudo header */
		sum = sum_replaced(0, &p->outer_source, source);
		sum = sum_replaced(sum, &p->outer_destination, destination);
		if (bpf_l4_csum_replace(skb, p->icmp + ICMP_CHECKSUM, 0, fold(sum), BPF_F_PSEUDO_HDR))
			return false;
	}
	return rewrite_ports(skb, p->transport, to) &&
	       rewrite_ip(skb, p->network, p->ip4, &to->source, &to->destination) &&
	       rewrite_ip(skb, p->outer_network, p->ip4, source, destination);
}

struct tcp_header {
	__be16 source_port;
	__be16 destination_port;
	__be32 sequence;
	__be32 acknowledgement;
	__u8 length; /* in the upper half, in words */
	__u8 flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

/* send_back swaps the Ethernet addresses, if there are any, and sends the packet out
 * of the device it came in by. It returns what the program is to return. */
static __always_inline int send_back(struct __sk_buff *skb, const struct packet *p)
{
	__u16 *frame = (void *)(long)skb->data;

	if (!p->frame)
		return bpf_redirect(skb->ifindex, 0);
	if ((void *)(frame + 6) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
#pragma unroll
	for (int i = 0; i < 3; i++) {
		__u16 half = frame[i];

		frame[i] = frame[i + 3];
		frame[i + 3] = half;
	}
	return bpf_redirect(skb->ifindex, 0);
}
