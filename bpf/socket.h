/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Who of the node waits for a packet: its sockets, and what the kernel tracks. */
#pragma once

#include "tuple.h"

/* What a socket of a network namespace is to what comes for a tuple. */
enum socket_use {
	SOCKET_NONE,
	SOCKET_OPEN,      /* it would get it, as from anybody */
	SOCKET_CONNECTED, /* it is connected to the sender */
};

/* lookup_tuple is a tuple as the kernel's own look-ups want it; it returns its size. */
static __always_inline __u32 lookup_tuple(const struct tuple *of, struct bpf_sock_tuple *to)
{
	if (is_ip4(&of->source)) {
		to->ipv4.saddr = of->source.word[3];
		to->ipv4.daddr = of->destination.word[3];
		to->ipv4.sport = of->source_port;
		to->ipv4.dport = of->destination_port;
		return sizeof(to->ipv4);
	}
	__builtin_memcpy(to->ipv6.saddr, &of->source, sizeof(to->ipv6.saddr));
	__builtin_memcpy(to->ipv6.daddr, &of->destination, sizeof(to->ipv6.daddr));
	to->ipv6.sport = of->source_port;
	to->ipv6.dport = of->destination_port;
	return sizeof(to->ipv6);
}

static __noinline enum socket_use socket_for(struct __sk_buff *skb, const struct tuple *incoming, __u64 space)
{
	struct bpf_sock_tuple tuple = {};
	__u32 size = lookup_tuple(incoming, &tuple);
	struct bpf_sock *sk;

	sk = incoming->protocol == IPPROTO_TCP ? bpf_sk_lookup_tcp(skb, &tuple, size, space, 0)
					       : bpf_sk_lookup_udp(skb, &tuple, size, space, 0);
	if (!sk)
		return SOCKET_NONE;
	enum socket_use use = sk->dst_port == incoming->source_port ? SOCKET_CONNECTED : SOCKET_OPEN;

	bpf_sk_release(sk);
	return use;
}

/* Whether the kernel can be asked what it tracks. It is probed by loading: functions of
 * the kernel are no ABI, these are there since Linux 5.18, and may be a module's. */
const volatile bool asks_conntrack = false;

extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *skb, struct bpf_sock_tuple *tuple, __u32 size,
					 struct bpf_ct_opts *how, __u32 how_size) __ksym __weak;
extern void bpf_ct_release(struct nf_conn *tracked) __ksym __weak;

/* is_tracked says whether the kernel tracks a connection of this namespace of which
 * such a packet would be: it would be translated for that. */
static __noinline bool is_tracked(struct __sk_buff *skb, const struct tuple *incoming)
{
	struct bpf_ct_opts how = { .netns_id = BPF_F_CURRENT_NETNS, .l4proto = incoming->protocol };
	struct bpf_sock_tuple tuple = {};
	__u32 size = lookup_tuple(incoming, &tuple);
	struct nf_conn *tracked = bpf_skb_ct_lookup(skb, &tuple, size, &how, sizeof(how));

	if (!tracked)
		return false;
	bpf_ct_release(tracked);
	return true;
}

/* is_free says that nobody else of this node waits for such packets. */
static __always_inline bool is_free(struct __sk_buff *skb, const struct tuple *incoming)
{
	return socket_for(skb, incoming, BPF_F_CURRENT_NETNS) == SOCKET_NONE &&
	       !(asks_conntrack && is_tracked(skb, incoming));
}
