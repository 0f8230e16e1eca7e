/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Pings (RFC 792; RFC 4443, 4): their identifier stands where others have ports. It is
 * the source port of a request, and the destination port of the reply; the other one is 0.
 */
#pragma once

#include "packet.h"
#include "rewrite.h"

enum {
	ICMP_ECHO_REPLY = 0,
	ICMP_ECHO_REQUEST = 8,
	ICMP6_ECHO_REQUEST = 128,
	ICMP6_ECHO_REPLY = 129,
};

/* The identifier stands so far behind the beginning of the ICMP header. */
#define ECHO_ID 4

static __always_inline bool is_icmp(const struct packet *p)
{
	return p->tuple.protocol == (p->ip4 ? IPPROTO_ICMP : IPPROTO_ICMPV6);
}

/* after_header is the offset of what follows the IP header at p->network, and notes
 * whether it is a fragment; 0 if that cannot be read. */
static __always_inline __u32 after_header(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (p->network > HEADERS_LIMIT)
		return 0;
	if (p->ip4) {
		const struct ip4_header *ip = data + p->network;

		if ((const void *)(ip + 1) > end)
			return 0;
		__u16 fragment = from_be16(ip->fragment);

		p->shape = SHAPE_WHOLE;
		if (fragment & IP4_FRAGMENT_OFFSET)
			p->shape = SHAPE_LATER;
		else if (fragment & IP4_MORE_FRAGMENTS)
			p->shape = SHAPE_FIRST;
		return p->network + (ip->version_length & 0x0f) * 4;
	}
	const struct ip6_header *ip = data + p->network;

	if ((const void *)(ip + 1) > end)
		return 0;
	struct walk walk = { .at = p->network + sizeof(*ip), .shape = SHAPE_WHOLE, .next = ip->next };

	if (is_extension(walk.next))
		extensions(skb, &walk);
	p->shape = walk.shape;
	return walk.at;
}

/* read_ping reads the identifier of a ping whose ICMP header is at an offset. Of the
 * packets inside errors it is for requests alone: nobody answers a reply. */
static __always_inline bool read_ping(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	const __u8 *icmp = (void *)(long)skb->data + at;

	if ((const void *)(icmp + 8) > (void *)(long)skb->data_end)
		return false;
	const __be16 *id = (const void *)(icmp + ECHO_ID);

	p->transport = at + ECHO_ID;
	if (icmp[0] == (p->ip4 ? ICMP_ECHO_REQUEST : ICMP6_ECHO_REQUEST))
		p->tuple.source_port = *id;
	else if (icmp[0] == (p->ip4 ? ICMP_ECHO_REPLY : ICMP6_ECHO_REPLY) && !p->icmp)
		p->tuple.destination_port = *id;
	else
		return false;
	return true;
}

/* read_echo reads a ping, or an ICMP error about a request, where read_packet() found
 * nothing that it knows. What is neither stays SHAPE_OTHER. */
static __noinline int read_echo(struct __sk_buff *skb, struct packet *p)
{
	if (p->shape != SHAPE_OTHER || !is_icmp(p) || (p->icmp && p->network == p->outer_network))
		return 0;
	__u32 at = after_header(skb, p);

	if (at && p->shape == SHAPE_LATER && !p->icmp)
		return 0;
	bool first = p->shape == SHAPE_FIRST;

	p->shape = SHAPE_OTHER;
	if (!at || at > HEADERS_LIMIT)
		return 0;
	if ((void *)(long)skb->data + at + 8 > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, skb->len < READ_AHEAD ? skb->len : READ_AHEAD))
		return 0;
	if (!read_ping(skb, at, p))
		return 0;
	if (p->icmp)
		p->shape = SHAPE_ERROR;
	else
		p->shape = first ? SHAPE_FIRST : SHAPE_WHOLE;
	return 0;
}

/* rewrite_echo makes a ping come from and go to other addresses, with another identifier.
 * Without a pseudo header the addresses of IPv4 are not in its checksum. */
static __always_inline bool rewrite_echo(struct __sk_buff *skb, const struct packet *p, const struct tuple *to)
{
	const struct tuple *from = &p->tuple;
	__u32 at = p->transport - ECHO_ID + ICMP_CHECKSUM;
	__u64 sum = (__u64)(__u32)~ports_of(from) + ports_of(to);

	if (bpf_l4_csum_replace(skb, at, 0, fold(sum), 0))
		return false;
	if (!p->ip4) {
		sum = sum_replaced(0, &from->source, &to->source);
		sum = sum_replaced(sum, &from->destination, &to->destination);
		if (bpf_l4_csum_replace(skb, at, 0, fold(sum), BPF_F_PSEUDO_HDR))
			return false;
	}
	__be16 *id = (void *)(long)skb->data + p->transport;

	if (p->transport > HEADERS_LIMIT + 60 || (void *)(id + 1) > (void *)(long)skb->data_end)
		return false;
	*id = to->source_port | to->destination_port;
	return rewrite_ip(skb, p->network, p->ip4, &to->source, &to->destination);
}

/* keep_number gives both tuples of an ICMP error about a ping the ping's number as the port
 * that it does not have: it stands where rewrite_error() writes that. */
static __always_inline bool keep_number(struct __sk_buff *skb, struct packet *p, struct tuple *to)
{
	const __be16 *id = (void *)(long)skb->data + p->transport;

	if (p->transport > HEADERS_LIMIT + 60 || (void *)(id + 2) > (void *)(long)skb->data_end)
		return false;
	p->tuple.destination_port = to->destination_port = id[1];
	return true;
}
