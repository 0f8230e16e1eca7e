/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The flows between pods and the world.
 *
 * A flow has two entries in flows, one for the packets of each direction, and each says
 * what the other is: the answer's key is the reverse of what the pod's packet became, and
 * becomes the reverse of what that was. A flow that somebody outside began with a pod's
 * own address has two as well, of which each becomes what it is: its answers keep the
 * pod's address.
 *
 * places bounds the flows: each has one, found by chance. A new flow takes one whose flow
 * has ended, without the agent; the agent takes what has ended out of the table, so that
 * memory is given back.
 */
#pragma once

#include "../../bpf/tuple.h"

/* What was seen of the packets of an entry. */
enum seen {
	SEEN_FIN = 1,
	SEEN_RST = 2,
	SEEN_PACKET = 4, /* one has passed */
	SEEN_LATER = 8,  /* one in another second than the first */
	SEEN_OPEN = 16,  /* TCP without SYN or RST: the handshake is over */
	SEEN_RST_OF_POD = 32,
};

struct flow {
	struct tuple to; /* what the packet becomes */
	__u64 was;       /* short_of() the key */
	__u32 seen;      /* seconds since boot of the last packet */
	enum seen flags;
	__u32 device; /* by which the first packet left, or came */
	__u32 place;  /* the flow's, in the entry for what the pod sends */
};

/* A place is its flow's that names it, too: the key alone may be that of an earlier flow,
 * which has another place since. */
struct place {
	struct tuple holder; /* the key of what a pod sends */
	__u32 claims;        /* odd while a flow is put into it */
	__u32 zero;
};

#define ANY_PLACE 0xffffffff

/* Both sizes are set before load; places has a power of two. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct tuple);
	__type(value, struct flow);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct place);
	__uint(max_entries, 1);
} places SEC(".maps");

const volatile __u32 places_mask = 0;

/* How long a silent flow is kept, in seconds. */
enum {
	KEEP_OPEN = 7440,        /* RFC 5382, REQ-5: 2 hours and 4 minutes */
	KEEP_HALF_CLOSED = 3600, /* kube-proxy's conntrack.tcpCloseWaitTimeout */
	KEEP_OPENING = 240,      /* RFC 5382, REQ-5: 4 minutes */
	KEEP_CLOSED = 60,        /* TCP_TIMEWAIT_LEN of linux/tcp.h */
	KEEP_RESET = 10,         /* nf_conntrack_tcp_timeout_close; by the pod, or before it was open */
	KEEP_UDP = 120,          /* RFC 4787, REQ-5 */
	KEEP_UDP_BRIEF = 30,     /* RFC 4787, REQ-5a: well-known ports; one question and its answer */
	KEEP_PING = 60,          /* RFC 5508, REQ-1 */
	KEEP_LEAST = 1,          /* also where there is no room */
};

#define WELL_KNOWN 1024

/* In the order in which they have to go. */
enum state { STATE_ALIVE, STATE_YOUNG, STATE_SPARE, STATE_EXPIRED };

/* is_as_it_is says that an entry changes nothing. */
static __always_inline bool is_as_it_is(const struct flow *entry, const struct tuple *key)
{
	return address_equal(&entry->to.source, &key->source) &&
	       address_equal(&entry->to.destination, &key->destination);
}

/* state_of says whether a flow can go, by the entries of both directions, the pod's first,
 * and the key of what the pod sends: STATE_EXPIRED at once, STATE_SPARE where there is no
 * room: closed, never answered, or a datagram or ping that was answered and no more.
 * STATE_YOUNG is not answered, but may be yet. A reset by the other end can be forged by
 * anybody who guesses the ports: what was open is only spare then (RFC 7857, 2.2). Datagrams
 * from outside alone do not keep a port of the node open (RFC 4787, REQ-6). */
static __always_inline enum state state_of(const struct flow *a, const struct flow *b, const struct tuple *key,
					   __u32 now)
{
	__u32 a_idle = now - a->seen, b_idle = now - b->seen;
	__u32 idle = (__s32)a_idle < (__s32)b_idle ? a_idle : b_idle;
	__u32 both = a->flags & b->flags, any = a->flags | b->flags;
	bool answered = both & SEEN_PACKET, spare = !answered;
	__u32 keep;

	if (key->protocol == IPPROTO_TCP) {
		bool open = answered && any & SEEN_OPEN;

		spare = !open || any & SEEN_RST || both & SEEN_FIN;
		if (any & SEEN_RST)
			keep = any & SEEN_RST_OF_POD || !open ? KEEP_RESET : KEEP_OPENING;
		else if (both & SEEN_FIN)
			keep = KEEP_CLOSED;
		else if (!open)
			keep = KEEP_OPENING;
		else
			keep = any & SEEN_FIN ? KEEP_HALF_CLOSED : KEEP_OPEN;
	} else {
		spare = !answered || !(any & SEEN_LATER);
		if (!is_as_it_is(a, key))
			idle = a_idle;
		if (key->protocol != IPPROTO_UDP)
			keep = KEEP_PING;
		else
			keep = spare && from_be16(key->destination_port) < WELL_KNOWN ? KEEP_UDP_BRIEF : KEEP_UDP;
	}
	if ((__s32)idle > (__s32)keep)
		return STATE_EXPIRED;
	if (spare && (__s32)idle > KEEP_LEAST)
		return STATE_SPARE;
	return answered ? STATE_ALIVE : STATE_YOUNG;
}
