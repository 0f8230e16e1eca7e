/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Refusing a packet: the sender is told at once, as the Service's own host would
 * tell it, by "port unreachable" (RFC 792, RFC 4443 3.1). connect() then ends with
 * ECONNREFUSED, and so does the next send() of a connected UDP socket.
 */
#pragma once

#include "../../bpf/rewrite.h"

#define ICMP_UNREACHABLE  3
#define ICMP_PORT         3
#define ICMP6_UNREACHABLE 1
#define ICMP6_PORT        4
#define ICMP_HEADER       8
#define HOPS              64

/* The refused packet's headers are quoted without its payload, and must be without
 * options: Linux sends none. */
#define QUOTE_LONGEST (sizeof(struct ip6_header) + 20)

struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 checksum;
	__u32 unused;
};

/* sum_of is the ones' complement sum of an ICMP message with its quote. */
static __always_inline bool sum_of(struct __sk_buff *skb, __u32 at, __u32 length, __u64 start, __u16 *checksum)
{
	__u8 quote[QUOTE_LONGEST] = {};

	if (length < 28 || length > QUOTE_LONGEST)
		return false;
	if (bpf_skb_load_bytes(skb, at, quote, length))
		return false;
	/* the rest of the buffer is zero, and adds nothing */
	__s64 sum = bpf_csum_diff(0, 0, (__be32 *)quote, sizeof(quote), 0);

	*checksum = ~fold16((__u64)(__u32)sum + start);
	return true;
}

__noinline int refuse_packet(struct __sk_buff *skb, const struct packet *p)
{
	if (!p)
		return TC_ACT_SHOT;

	__u32 address_length = p->ip4 ? sizeof(struct ip4_header) : sizeof(struct ip6_header);
	__u32 quote = p->transport - p->network + (p->tuple.protocol == IPPROTO_TCP ? 20 : 8);
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
	if (!sum_of(skb, p->network, quote, start, &icmp.checksum))
		return TC_ACT_SHOT;
	if (bpf_skb_change_tail(skb, p->network + quote, 0) ||
	    bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_NO_CSUM_RESET) ||
	    bpf_skb_store_bytes(skb, ETHERNET_LENGTH + address_length, &icmp, sizeof(icmp), 0))
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
		if (bpf_skb_store_bytes(skb, ETHERNET_LENGTH, &ip, sizeof(ip), 0))
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

		if (bpf_skb_store_bytes(skb, ETHERNET_LENGTH, &ip, sizeof(ip), 0))
			return TC_ACT_SHOT;
	}
	return send_back(skb);
}
