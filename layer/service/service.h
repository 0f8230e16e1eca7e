/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The Service tables, and decide(): which backend a Service's next flow goes to.
 *
 * services: address, port, protocol -> id and number of slots, and the rules
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
#include "client.h"

/* Which path serves, as far as a Service or a network namespace asks for one. */
enum service_path {
	PATH_DEFAULT, /* the setting default_path */
	PATH_SOCKET,  /* at connect() and sendmsg() */
	PATH_PACKET,  /* each packet, at the pod's veth */
};

/* What else a Service asks. */
enum service_flags {
	SERVICE_APART = 1,         /* clients from outside the cluster have slots of their own */
	SERVICE_DROPS = 2,         /* without a backend, drop instead of refusing: other nodes have some */
	SERVICE_DROPS_OUTSIDE = 4, /* the same for clients from outside */
	SERVICE_MASQUERADE = 8,    /* those from outside come to the backend from the node's address */
	SERVICE_RANGES = 16,       /* only clients in source_ranges */
};

struct service {
	__u32 id;
	__u32 slots;    /* how many backends; 0: refuse */
	__u8 path;      /* enum service_path */
	__u8 flags;     /* enum service_flags */
	__u16 none;     /* always 0 */
	__u32 affinity; /* for how many seconds a client stays with its backend; 0: it does not */
	__u32 outside;  /* the id whose slots are for clients from outside (SERVICE_APART) */
	__u32 outside_slots;
} __attribute__((aligned(8)));

struct slot_key {
	__u32 service; /* struct service.id or outside */
	__u32 slot;
};

struct backend {
	struct address address;
	__be16 port;
	__u16 zero;
	__u32 service; /* the id whose slot leads to it; a number is never in two */
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
	VERSION_TABLES = 2,
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
	__u32 service;          /* the id whose slots were looked at; 0 where it is nobody's */
	__u32 slots;            /* how many those are */
	__u32 number;           /* of the backend */
	enum service_path path; /* as the Service asks */
	enum service_flags flags;
	__u32 masquerade; /* a client that comes by the wire gets the node's address */
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
	volatile __u64 *found = bpf_map_lookup_elem(&services, key);
	__u64 *to = (__u64 *)copy;

	if (!found)
		return false;
#pragma unroll
	for (__u32 i = 0; i < sizeof(*copy) / 8; i++)
		to[i] = found[i]; /* id and slots in one load, and so on */
	return true;
}

static __always_inline bool same_service(const struct service *a, const struct service *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;
	__u64 differences = 0;

#pragma unroll
	for (__u32 i = 0; i < sizeof(*a) / 8; i++)
		differences |= x[i] ^ y[i];
	return !differences;
}

/* find_service is read_service() also for the node ports, which any of the node's
 * addresses has; *key becomes the one under which it was found. What is at a loopback
 * address is at the node's alone: pods have one, too. */
static __always_inline bool find_service(struct service_key *key, bool own, struct service *copy)
{
	if (read_service(key, copy))
		return own || !is_loopback(&key->address);
	return any_address(key, own) && read_service(key, copy);
}

static __always_inline bool read_backend(__u32 number, __u32 service, struct backend *copy)
{
	struct backend *found = bpf_map_lookup_elem(&backends, &number);

	if (!found)
		return false;
	*copy = *found;
	return copy->service == service && bpf_map_lookup_elem(&backends, &number) == found;
}

/* pick chooses a backend, each with the same probability. */
static __always_inline bool pick(struct decision *to)
{
	struct slot_key slot = {
		.service = to->service,
		/* multiply and shift instead of modulo: no division */
		.slot = ((__u64)bpf_get_prandom_u32() * to->slots) >> 32,
	};
	__u32 *number = bpf_map_lookup_elem(&slots, &slot);

	if (!number)
		return false;
	to->number = *number;
	return read_backend(to->number, to->service, &to->backend);
}

/* stay finds the backend that the client had last, if it is still to have it. */
static __noinline bool stay(const struct question *asked, struct decision *to)
{
	struct affinity_key key = { .service = to->service };

	client_of(asked, &key.client);
	struct affinity *last = bpf_map_lookup_elem(&affinities, &key);

	if (!last || (__s32)(last->until - seconds()) < 0)
		return false;
	to->number = last->number;
	return read_backend(to->number, to->service, &to->backend);
}

/* keep notes which backend a client has. */
static __noinline void keep(const struct question *asked, const struct decision *to, __u32 lasts)
{
	struct affinity_key key = { .service = to->service };
	struct affinity last = { .number = to->number, .until = seconds() + lasts };

	client_of(asked, &key.client);
	if (bpf_map_update_elem(&affinities, &key, &last, BPF_ANY))
		count(REASON_AFFINITIES_FULL);
}

/* let_in says whether a Service that chooses its clients lets this one in: then it
 * is VERDICT_FORWARD. A socket whose address nobody knows is left alone: its packets
 * have one. */
static __noinline int let_in(const struct question *asked, __u32 service)
{
	struct source_range_key key = { .length = 32 + 128, .service = service };

	if (!client_of(asked, &key.client))
		return VERDICT_NOT_A_SERVICE;
	return bpf_map_lookup_elem(&source_ranges, &key) ? VERDICT_FORWARD : VERDICT_DROP;
}

/* without says what happens where there is no backend. */
static __always_inline void without(struct decision *to, bool drops)
{
	to->verdict = drops ? VERDICT_DROP : VERDICT_REFUSE;
	to->reason = drops ? REASON_NO_LOCAL_BACKEND : REASON_NO_BACKEND;
}

/* consider looks a Service's rules up in to; it says whether a backend is to be
 * chosen. */
static __always_inline bool consider(const struct question *asked, const struct service *service, struct decision *to)
{
	bool outside = asked->origin == ORIGIN_OUTSIDE;
	bool apart = outside && service->flags & SERVICE_APART;

	to->service = apart ? service->outside : service->id;
	to->slots = apart ? service->outside_slots : service->slots;
	to->path = service->path;
	to->flags = service->flags;
	to->masquerade = service->flags & SERVICE_MASQUERADE;
	if (service->flags & SERVICE_RANGES) {
		to->verdict = let_in(asked, service->id);
		to->reason = REASON_NOT_LET_IN;
		if (to->verdict != VERDICT_FORWARD)
			return false;
	}
	if (to->slots == 0) {
		without(to, service->flags & (apart ? SERVICE_DROPS_OUTSIDE : SERVICE_DROPS));
		return false;
	}
	return true;
}

/* decide chooses a backend for a new flow. to->backend is only valid if the
 * verdict is VERDICT_FORWARD. It is the one place where this is decided: a global
 * function, verified by itself, that the programs of both paths and of `explain`
 * call. It returns the verdict. */
__noinline int decide(const struct question *asked, struct decision *to)
{
	struct service service = {}, again = {};
	struct service_key own;

	if (!asked || !to) /* for the verifier, who sees no caller */
		return VERDICT_NOT_A_SERVICE;
	own = asked->key; /* before Linux 6.2 a key must lie on one's own stack */
	for (int round = 0; round < DECIDE_ROUNDS; round++) {
		if (!find_service(&own, asked->origin == ORIGIN_NODE, &service)) {
			to->verdict = VERDICT_NOT_A_SERVICE;
			break;
		}
		if (!consider(asked, &service, to))
			break;
		to->verdict = VERDICT_REFUSE;
		to->reason = REASON_UNSETTLED;
		if (!(service.affinity && stay(asked, to)) && !pick(to))
			continue;
		if (!read_service(&own, &again) || !same_service(&service, &again))
			continue;
		if (service.affinity)
			keep(asked, to, service.affinity);
		to->verdict = VERDICT_FORWARD;
		to->reason = REASON_FORWARDED;
		break;
	}
	return to->verdict;
}
