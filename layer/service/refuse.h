/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Refusing a packet: the sender is told at once, as the Service's own host would
 * tell it. A SYN gets a reset (RFC 9293, 3.10.7.1), so that connect() ends with
 * ECONNREFUSED; a datagram "port unreachable" (RFC 792; RFC 4443, 3.1), so that the
 * next send() of a connected socket does. A SYN gets no ICMP, for Linux forgets
 * one that comes while the socket is still in connect(), and waits a second.
 */
#pragma once

#include "../../bpf/rewrite.h"
#include "translation.h"

#define ICMP_UNREACHABLE  3
#define ICMP_PORT         3
#define ICMP6_UNREACHABLE 1
#define ICMP6_PORT        4
#define ICMP_HEADER       8
#define HOPS              64

/* The refused datagram's headers are quoted without its payload, and must be
 * without options: Linux sends none. */
#define QUOTE_LONGEST (sizeof(struct ip6_header) + 8)

struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 unused;
};

/* sum_of is the ones' complement sum of an ICMP message with its quote. */
static __always_inline bool sum_of(struct __sk_buff *skb, const struct packet *p, __u64 start, __u16 *checksum)
{
	__u8 quote[QUOTE_LONGEST] = {};
	long error = p->ip4 ? bpf_skb_load_bytes(skb, p->network, quote, sizeof(struct ip4_header) + 8)
			    : bpf_skb_load_bytes(skb, p->network, quote, sizeof(struct ip6_header) + 8);

	if (error)
		return false;
	/* the rest of the buffer is zero, and adds nothing */
	__s64 sum = bpf_csum_diff(0, 0, (__be32 *)quote, sizeof(quote), 0);

	*checksum = ~fold16((__u64)(__u32)sum + start);
	return true;
}

/* refuse_datagram makes an ICMP error of a datagram. */
__noinline int refuse_datagram(struct __sk_buff *skb, const struct packet *p)
{
	if (!p)
		return TC_ACT_SHOT;

	__u32 address_length = p->ip4 ? sizeof(struct ip4_header) : sizeof(struct ip6_header);
	__u32 quote = p->transport - p->network + 8;
	__u32 room = address_length + ICMP_HEADER;
	struct icmp_header icmp = {
		.type = p->ip4 ? ICMP_UNREACHABLE : ICMP6_UNREACHABLE,
		.code = p->ip4 ? ICMP_PORT : ICMP6_PORT,
	};
	__u64 start = icmp.type | icmp.code << 8;

	if (p->shape == SHAPE_LATER || p->transport != p->network + address_length || skb->gso_segs > 1)
		return TC_ACT_SHOT;
	if (!p->ip4) { /* the pseudo header (RFC 8200, 8.1) */
		start = sum_words(start, &p->tuple.source);
		start = sum_words(start, &p->tuple.destination);
		start += __builtin_bswap32(ICMP_HEADER + quote) + __builtin_bswap32(IPPROTO_ICMPV6);
	}
	if (!sum_of(skb, p, start, &icmp.checksum))
		return TC_ACT_SHOT;
	if (bpf_skb_change_tail(skb, p->network + quote, 0) ||
	    bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_NO_CSUM_RESET) ||
	    bpf_skb_store_bytes(skb, p->frame + address_length, &icmp, sizeof(icmp), 0))
		return TC_ACT_SHOT;
	if (p->ip4) {
		struct ip4_header ip = {
			.version_length = 0x45,
			.length = __builtin_bswap16(room + quote),
			.ttl = HOPS,
			.protocol = IPPROTO_ICMP,
			.source = p->tuple.destination.word[3],
			.destination = p->tuple.source.word[3],
		};

		ip.checksum = ~fold16((__u32)bpf_csum_diff(0, 0, (__be32 *)&ip, sizeof(ip), 0));
		if (bpf_skb_store_bytes(skb, p->frame, &ip, sizeof(ip), 0))
			return TC_ACT_SHOT;
	} else {
		struct ip6_header ip = {
			.version_class_flow = __builtin_bswap32(6 << 28),
			.length = __builtin_bswap16(ICMP_HEADER + quote),
			.next = IPPROTO_ICMPV6,
			.hops = HOPS,
			.source = p->tuple.destination,
			.destination = p->tuple.source,
		};

		if (bpf_skb_store_bytes(skb, p->frame, &ip, sizeof(ip), 0))
			return TC_ACT_SHOT;
	}
	return send_back(skb, p);
}

/* set_length writes how long the IP packet is now. */
static __always_inline bool set_length(struct __sk_buff *skb, const struct packet *p, __u32 transport)
{
	__u32 headers = p->transport - p->network;
	__be16 was, is;

	if (!p->ip4) {
		is = __builtin_bswap16(headers - sizeof(struct ip6_header) + transport);
		return !bpf_skb_store_bytes(skb, p->network + 4, &is, sizeof(is), 0);
	}
	is = __builtin_bswap16(headers + transport);
	return !bpf_skb_load_bytes(skb, p->network + 2, &was, sizeof(was)) &&
	       !bpf_l3_csum_replace(skb, p->network + IP4_CHECKSUM, was, is, sizeof(is)) &&
	       !bpf_skb_store_bytes(skb, p->network + 2, &is, sizeof(is), 0);
}

/* reset makes a reset of a segment: as if there were no connection (RFC 9293, 3.5.2). */
__noinline int reset(struct __sk_buff *skb, const struct packet *p)
{
	struct tcp_header segment, tcp = {};
	struct tuple back;
	__u64 sum;

	if (!p || p->shape != SHAPE_WHOLE || bpf_skb_load_bytes(skb, p->transport, &segment, sizeof(segment)))
		return TC_ACT_SHOT;
	tcp.source_port = segment.destination_port;
	tcp.destination_port = segment.source_port;
	tcp.length = sizeof(tcp) / 4 << 4;
	tcp.flags = TCP_RST;
	if (segment.flags & TCP_ACK) {
		tcp.sequence = segment.acknowledgement;
	} else { /* a SYN */
		tcp.acknowledgement = __builtin_bswap32(__builtin_bswap32(segment.sequence) + 1);
		tcp.flags |= TCP_ACK;
	}
	sum = __builtin_bswap32(sizeof(tcp)) + __builtin_bswap32(IPPROTO_TCP);
	/* IPv4's pseudo header (RFC 9293, 3.1) has no ::ffff:, which adds 0xffff: nothing */
	sum = sum_words(sum, &p->tuple.source);
	sum = sum_words(sum, &p->tuple.destination);
	tcp.checksum = ~fold16(sum + (__u32)bpf_csum_diff(0, 0, (__be32 *)&tcp, sizeof(tcp), 0));
	if (bpf_skb_change_tail(skb, p->transport + sizeof(tcp), 0) ||
	    bpf_skb_store_bytes(skb, p->transport, &tcp, sizeof(tcp), 0) || !set_length(skb, p, sizeof(tcp)))
		return TC_ACT_SHOT;
	reverse(&p->tuple, &back);
	if (!rewrite_ip(skb, p->network, p->ip4, &back.source, &back.destination))
		return TC_ACT_SHOT;
	return send_back(skb, p);
}

static __always_inline int refuse_packet(struct __sk_buff *skb, const struct packet *p)
{
	return p->tuple.protocol == IPPROTO_TCP ? reset(skb, p) : refuse_datagram(skb, p);
}
