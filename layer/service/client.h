/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Who asks for a Service, as far as the answer depends on it: whether the client
 * is inside the cluster, and its address.
 */
#pragma once

#include "../../bpf/tuple.h"

struct service_key {
	struct address address; /* unspecified: any of the node's */
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

/* Somebody's addresses; all zero where there is none of a family. */
struct addresses {
	struct address ip4;
	struct address ip6;
};

/* Where a client is. */
enum origin {
	ORIGIN_POD,     /* a pod of this node */
	ORIGIN_NODE,    /* a process of this node itself */
	ORIGIN_OUTSIDE, /* on another machine: also a pod of another node, which asks this one from outside */
};

/* What is asked of decide(). */
struct question {
	struct service_key key;
	struct address client; /* where cookie is 0 */
	enum origin origin;
	__u64 cookie; /* of the client's network namespace, where its address is not known */
};

/* For whom an address of the node has node ports. */
enum node_address {
	ADDRESS_OF_NODE = 1,
	ADDRESS_OF_LOOPBACK = 2, /* for the node's own processes: pods have one, too */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct address);
	__type(value, enum node_address);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} node_addresses SEC(".maps");

/* Between which ports all node ports lie. */
struct port_range {
	__u16 lowest; /* in the host's order; both 0 where there is none */
	__u16 highest;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct port_range);
	__uint(max_entries, 1);
} node_ports SEC(".maps");

/* any_address makes a key with an address of the node one with any of them, if
 * its port may be a node port. own says that a process of the node asks. */
static __always_inline bool any_address(struct service_key *key, bool own)
{
	__u32 zero = 0;
	__u16 port = __builtin_bswap16(key->port);
	struct port_range *range = bpf_map_lookup_elem(&node_ports, &zero);

	if (!range || port < range->lowest || port > range->highest)
		return false;
	struct address at = key->address;
	enum node_address *whose = bpf_map_lookup_elem(&node_addresses, &at);

	if (!whose || (*whose == ADDRESS_OF_LOOPBACK && !own))
		return false;
	if (!is_ip4(&key->address))
		key->address.word[0] = key->address.word[1] = key->address.word[2] = 0;
	key->address.word[3] = 0;
	return true;
}

/* The addresses of network namespaces, for those who ask from a socket, which may
 * have none yet. Only written where a Service asks for its clients' addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64); /* the namespace's cookie */
	__type(value, struct addresses);
	__uint(max_entries, 4096); /* pods of one node; Kubernetes plans for 110 */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} clients SEC(".maps");

/* The first word of what stands for a client whose address is not known:
 * ff00::/8, which no client has. */
#define UNKNOWN_CLIENT 0x000000ffU

/* client_of is the client's address, the same on both paths; or where nobody
 * knows it, which it says, what stands for its namespace. */
static __always_inline bool client_of(const struct question *asked, struct address *client)
{
	__u64 cookie = asked->cookie;

	*client = asked->client;
	if (!cookie)
		return true;
	struct addresses *known = bpf_map_lookup_elem(&clients, &cookie);

	client->word[0] = UNKNOWN_CLIENT;
	client->word[1] = 0;
	client->word[2] = cookie >> 32;
	client->word[3] = cookie;
	if (!known)
		return false;
	const struct address *found = is_ip4(&asked->key.address) ? &known->ip4 : &known->ip6;

	if (!found->word[0] && !found->word[3])
		return false;
	*client = *found;
	return true;
}

/* The clients that a Service lets in (loadBalancerSourceRanges). */
struct source_range_key {
	__u32 length;  /* in bits: 32 for service, and those of the range */
	__u32 service; /* struct service.id */
	struct address client;
};

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct source_range_key);
	__type(value, __u8);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} source_ranges SEC(".maps");

/* Which backend a client had last (sessionAffinity: ClientIP). The agent clears
 * away what is over. */
struct affinity_key {
	__u32 service; /* the id whose slots led there */
	struct address client;
};

struct affinity {
	__u32 number; /* of the backend */
	__u32 until;  /* seconds since boot */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} affinities SEC(".maps");
