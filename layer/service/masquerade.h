/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Clients from outside whose packets have to leave for another node come to it
 * from this node's address, or its answers would go past us.
 *
 * The Service's address becomes the endpoint's where the packet comes in
 * (from_wire), the client's address the node's where it goes out (to_wire); answers
 * take the same way back. So what the host's stack sees in between, connection
 * tracking and the rules of network policies included, is one consistent flow
 * between the client and the endpoint.
 *
 * A masqueraded flow has two entries here, beside its two in translations:
 * client -> endpoint becomes node -> endpoint, endpoint -> node becomes
 * endpoint -> client.
 */
#pragma once

#include "../../bpf/socket.h"
#include "service.h"
#include "translation.h"

/* The devices by which packets leave the node, and the node's addresses there. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32); /* the device's index */
	__type(value, struct addresses);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wires SEC(".maps");

/* The source ports that are given: none that a socket of the node is given by the
 * kernel, and no node port. */
const volatile __u16 first_port = 1024;
const volatile __u16 port_count = 28976;

/* How many ports are tried. */
#define PORT_TRIES 16

#define ENOENT 2
#define EEXIST 17

/* find_masquerade copies the entry for a tuple: with out one for what leaves the
 * node, whose source becomes another, else one for what comes back, whose
 * destination does. */
static __always_inline bool find_masquerade(const struct tuple *key, bool out, struct masquerade *copy)
{
	struct masquerade *entry = bpf_map_lookup_elem(&masquerades, key);

	if (!entry)
		return false;
	*copy = *entry;
	return copy->was == short_of(key) && out == address_equal(&key->destination, &copy->to.destination);
}

/* leaves_from is the node's address where packets to an endpoint leave the node;
 * false if they do not, for the endpoint is here. */
static __noinline bool leaves_from(struct __sk_buff *skb, const struct tuple *to, struct address *from)
{
	bool ip4 = is_ip4(&to->destination);
	struct bpf_fib_lookup way = {
		.family = ip4 ? AF_INET : AF_INET6,
		.l4_protocol = to->protocol,
		.sport = to->source_port,
		.dport = to->destination_port,
		.ifindex = skb->ifindex,
	};

	if (ip4) {
		way.source[0] = to->source.word[3];
		way.destination[0] = to->destination.word[3];
	} else {
		__builtin_memcpy(way.source, &to->source, sizeof(way.source));
		__builtin_memcpy(way.destination, &to->destination, sizeof(way.destination));
	}
	long result = bpf_fib_lookup(skb, (void *)&way, sizeof(way), 0);

	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH &&
	    result != BPF_FIB_LKUP_RET_FRAG_NEEDED)
		return false;
	struct addresses *wire = bpf_map_lookup_elem(&wires, &way.ifindex);

	if (!wire)
		return false;
	*from = ip4 ? wire->ip4 : wire->ip6;
	return from->word[3];
}

/* give_port gives the flow on the workbench a port of the node towards its
 * endpoint: the client's own if it can be had. w->out.to is the node's packet but
 * for the port. */
static __always_inline long give_port(struct __sk_buff *skb, struct workbench *w)
{
	__u16 port = __builtin_bswap16(w->client.to.source_port);
	long error = -EEXIST;

	for (int i = 0; i < PORT_TRIES && error == -EEXIST; i++) {
		if (i > 0 || (__u16)(port - first_port) >= port_count)
			port = first_port + (((__u64)bpf_get_prandom_u32() * port_count) >> 32);
		w->out.to.source_port = __builtin_bswap16(port);
		reverse(&w->out.to, &w->in_key);
		w->in.was = short_of(&w->in_key);
		if (is_free(skb, &w->in_key))
			error = bpf_map_update_elem(&masquerades, &w->in_key, &w->in, BPF_NOEXIST);
	}
	return error;
}

/* make_masquerade makes the entries for the flow on the workbench if it leaves the
 * node. It returns 0, or an error that was counted. */
__noinline int make_masquerade(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return -1;
	w->out_key = w->client.to;
	if (bpf_map_lookup_elem(&masquerades, &w->out_key))
		return 0; /* of the same two before */
	w->out.to = w->client.to;
	if (!leaves_from(skb, &w->client.to, &w->out.to.source))
		return 0;
	w->out.was = short_of(&w->out_key);
	reverse(&w->client.to, &w->in.to);
	long error = give_port(skb, w);

	if (!error) {
		error = bpf_map_update_elem(&masquerades, &w->out_key, &w->out, BPF_NOEXIST);
		w->made = !error;
		if (error)
			bpf_map_delete_elem(&masquerades, &w->in_key);
		if (error == -EEXIST) /* the same flow's next packet was faster, on another CPU */
			return 0;
	}
	if (error)
		count(error == -EEXIST ? REASON_NO_PORT : REASON_NO_STORAGE);
	return error;
}

/* unmake_masquerade takes back what make_masquerade() made for this packet. */
static __always_inline void unmake_masquerade(struct workbench *w)
{
	if (!w->made)
		return;
	w->ended = w->out_key;
	drop_masquerade(w);
}
