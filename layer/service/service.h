/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The Service tables, and decide(): which backend a Service's next flow goes to.
 *
 * services: address, port, protocol -> id and number of slots
 * slots:    id, slot                -> backend number
 * backends: backend number          -> address and port
 *
 * Each look-up is O(1). The agent writes backends, then slots, then services,
 * and removes in reverse. So whatever count a reader has seen, its slots were
 * there; if one is gone, the Service has changed since, and it is read again.
 */
#pragma once

#include "../../bpf/address.h"
#include "../../bpf/verdict.h"

struct service_key {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

/* Which path serves, as far as a Service or a network namespace asks for one. */
enum service_path {
	PATH_DEFAULT, /* the setting default_path */
	PATH_SOCKET,  /* at connect() and sendmsg() */
	PATH_PACKET,  /* each packet, at the pod's veth */
};

struct service {
	__u32 id;
	__u32 slots; /* how many backends; 0: refuse */
	__u8 path;   /* enum service_path */
	__u8 zero[7];
} __attribute__((aligned(8)));

struct slot_key {
	__u32 service; /* struct service.id */
	__u32 slot;
};

struct backend {
	struct address address;
	__be16 port;
	__u16 zero;
	__u32 service; /* the struct service.id it belongs to; a number is never in two */
};

/* The groups of maps that are taken over together from another version of these
 * programs (schema.go). */
enum schema_group {
	SCHEMA_TABLES,
	SCHEMA_SOCKETS,
	SCHEMA_FLOWS,
	SCHEMA_FRAGMENTS,
	SCHEMA_COUNT,
};

/* The version of each group, to be raised with every change of what its maps
 * hold. Between versions, fields of one name are one thing: what changes its
 * meaning changes its name. 0 is never a version. */
enum schema_version {
	VERSION_TABLES = 1,
	VERSION_SOCKETS = 1,
	VERSION_FLOWS = 1,
	VERSION_FRAGMENTS = 1,
};

/* Which versions the maps pinned beside it have. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, enum schema_group);
	__type(value, enum schema_version);
	__uint(max_entries, SCHEMA_COUNT);
} schema SEC(".maps");

/* Not 0 once programs of another version stand behind these ones: they begin
 * the new flows, those that are known here are still served here. Every version
 * knows this map, as it is. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} handover SEC(".maps");

static __always_inline bool handed_over(void)
{
	__u32 zero = 0, *value = bpf_map_lookup_elem(&handover, &zero);

	return value && *value;
}

/* Sizes are set before load, from what the cluster needs (datapath.go). Nothing is
 * preallocated: an entry costs memory when it is there. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct service_key);
	__type(value, struct service);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct slot_key);
	__type(value, __u32);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} slots SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct backend);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} backends SEC(".maps");

/* How often each enum reason applied, per CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum reason);
	__type(value, __u64);
	__uint(max_entries, REASON_COUNT);
} reasons SEC(".maps");

static __always_inline void count(enum reason reason)
{
	__u64 *n = bpf_map_lookup_elem(&reasons, &reason);

	if (n)
		(*n)++;
}

struct decision {
	enum verdict verdict;
	enum reason reason;
	__u32 service;          /* struct service.id; 0 where it is nobody's */
	__u32 slots;            /* of the Service */
	__u32 number;           /* of the backend */
	enum service_path path; /* as the Service asks */
	struct backend backend;
};

/* A Service that changes between two of our look-ups is read again. Three rounds
 * suffice: an update takes the agent at least a microsecond. */
#define DECIDE_ROUNDS 3

/* The memory of an element that is removed or replaced serves another one at
 * once (kernel/bpf/memalloc.c), also while a program still reads it. So what was
 * read counts only if the same key leads to the same again afterwards: neither a
 * Service's id nor a backend's number is ever given twice. */
static __always_inline bool read_service(const struct service_key *key, struct service *copy)
{
	struct service *found = bpf_map_lookup_elem(&services, key);

	if (!found)
		return false;
	/* id and slots in one load */
	*(__u64 *)copy = *(volatile __u64 *)found;
	copy->path = found->path;
	return true;
}

static __always_inline bool read_backend(__u32 number, __u32 service, struct backend *copy)
{
	struct backend *found = bpf_map_lookup_elem(&backends, &number);

	if (!found)
		return false;
	*copy = *found;
	return copy->service == service && bpf_map_lookup_elem(&backends, &number) == found;
}

/* decide chooses a backend for a new flow to key, each with the same
 * probability. to->backend is only valid if the verdict is VERDICT_FORWARD. It
 * is the one place where this is decided: a global function, verified by itself,
 * that the programs of both paths and of `explain` call. It returns the verdict. */
__noinline int decide(const struct service_key *key, struct decision *to)
{
	struct service service = {}, again = {};
	struct service_key own;

	if (!key || !to) /* for the verifier, who sees no caller */
		return VERDICT_NOT_A_SERVICE;
	own = *key; /* before Linux 6.2 a key must lie on one's own stack */
	to->verdict = VERDICT_REFUSE;
	to->reason = REASON_UNSETTLED;
#pragma unroll
	for (int round = 0; round < DECIDE_ROUNDS; round++) {
		if (!read_service(&own, &service)) {
			to->verdict = VERDICT_NOT_A_SERVICE;
			break;
		}
		to->service = service.id;
		to->slots = service.slots;
		to->path = service.path;
		if (service.slots == 0) {
			to->reason = REASON_NO_BACKEND;
			break;
		}
		struct slot_key slot = {
			.service = service.id,
			/* multiply and shift instead of modulo: no division */
			.slot = ((__u64)bpf_get_prandom_u32() * service.slots) >> 32,
		};
		__u32 *number = bpf_map_lookup_elem(&slots, &slot);

		if (!number)
			continue;
		to->number = *number;
		if (!read_backend(to->number, service.id, &to->backend))
			continue;
		if (!read_service(&own, &again) || again.id != service.id)
			continue;
		to->verdict = VERDICT_FORWARD;
		to->reason = REASON_FORWARDED;
		break;
	}
	return to->verdict;
}
