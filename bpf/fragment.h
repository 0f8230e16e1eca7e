/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Later fragments have no ports: they get those of the first one. */
#pragma once

#include "packet.h"

/* Where the first fragment of a datagram went: the later ones have no ports.
 * Linux sends the first one first, so an entry lives for microseconds. */
struct fragment_key {
	struct address source;
	struct address destination;
	__u32 id;
	__u8 protocol;
	__u8 to_pod; /* the direction: both have datagrams between the same two */
	__u8 zero[2];
};

struct fragment {
	__be16 source_port;
	__be16 destination_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct fragment_key);
	__type(value, struct fragment);
	__uint(max_entries, 4096);
} fragments SEC(".maps");

static __always_inline void fragment_key_of(const struct packet *p, bool to_pod, struct fragment_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	key->source = p->tuple.source;
	key->destination = p->tuple.destination;
	key->id = p->fragment;
	key->protocol = p->tuple.protocol;
	key->to_pod = to_pod;
}

static __noinline void keep_fragment(const struct packet *p, bool to_pod)
{
	struct fragment ports = { p->tuple.source_port, p->tuple.destination_port };
	struct fragment_key key;

	fragment_key_of(p, to_pod, &key);
	bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
}

/* find_fragment gives a later fragment the ports of the first. */
static __noinline bool find_fragment(struct packet *p, bool to_pod)
{
	struct fragment_key key;

	fragment_key_of(p, to_pod, &key);
	struct fragment *ports = bpf_map_lookup_elem(&fragments, &key);

	if (!ports)
		return false;
	p->tuple.source_port = ports->source_port;
	p->tuple.destination_port = ports->destination_port;
	return true;
}

/* has_tuple says whether a packet's tuple is whole, if need be by its first
 * fragment. */
static __always_inline bool has_tuple(struct packet *p, bool to_pod)
{
	if (p->shape == SHAPE_LATER)
		return find_fragment(p, to_pod);
	return p->shape == SHAPE_WHOLE || p->shape == SHAPE_FIRST;
}

/* of_vlan says that a packet is tagged for a VLAN, whose own device is the wire: what
 * the tag's carrier translates as well would be translated twice. Number 0 is none
 * (IEEE 802.1Q: a priority only). */
static __always_inline bool of_vlan(const struct __sk_buff *skb)
{
	return skb->vlan_present && skb->vlan_tci & 0xfff;
}
