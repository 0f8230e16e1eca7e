/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The flows of the packet path: what becomes of the addresses of each packet.
 *
 * A flow has two entries in translations, one for the packets of each direction,
 * and each says what the other is: the reply's key is the reverse of what the
 * first packet became, and becomes the reverse of what the first packet was.
 *
 * places bounds the flows: each has one. The agent walks over them, clears what
 * has expired away and puts the places into vacant (sweep), where new flows take
 * them. So memory is given back, and a new flow finds a place at once. Where
 * vacant is empty, at first and without the agent, new flows walk themselves, in
 * circles and a few steps each.
 *
 * A flow's entry exists only while its place holds its key. Hence an entry is
 * replaced, never removed and made again, when its flow begins anew.
 */
#pragma once

#include "../../bpf/tuple.h"
#include "service.h"

enum role {
	ROLE_FROM_POD = 1, /* the client's packets, at from_pod */
	ROLE_TO_POD = 2,   /* the replies, at to_pod */
	ROLE_HAIRPIN = 3,  /* both directions, at from_pod: a pod that meets itself */
};

/* What was seen of a flow. */
enum seen {
	SEEN_FIN = 1,
	SEEN_RST = 2,
	SEEN_REPLY = 4, /* only in a reply's entry: one has passed */
	SEEN_LATER = 8, /* a packet in another second than the first */
	SEEN_GONE = 16, /* only in a client's entry: the endpoint is gone, who still sends is reset */
};

struct translation {
	struct tuple to; /* what the packet becomes */
	__u64 was;       /* short_of() the key */
	__u32 service;   /* struct service.id; 0 where there is none (keep_apart) */
	__u32 number;    /* of the backend */
	__u32 seen;      /* seconds since boot of the last packet */
	enum seen flags;
	enum role role;
	__u32 zero;
};

/* Both sizes are set before load; places has a power of two. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct tuple);
	__type(value, struct translation);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} translations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct tuple);
	__uint(max_entries, 1);
} places SEC(".maps");

/* Places that were made free. */
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__type(value, __u32);
	__uint(max_entries, 1);
} vacant SEC(".maps");

/* The next place to be looked at, growing for ever; and how many entries there
 * are and were. */
struct usage {
	__u32 hand;
	__u32 zero;
	__s64 flows;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct usage);
	__uint(max_entries, 1);
} flow_usage SEC(".maps");

const volatile __u32 places_mask = 0;

/* How long a silent flow is kept, in seconds. */
enum {
	KEEP_OPEN = 86400,       /* kube-proxy's conntrack.tcpEstablishedTimeout; RFC 5382, REQ-5 asks for 7440 */
	KEEP_HALF_CLOSED = 3600, /* kube-proxy's conntrack.tcpCloseWaitTimeout */
	KEEP_CLOSED = 60,        /* TCP_TIMEWAIT_LEN of linux/tcp.h */
	KEEP_RESET = 10,         /* nf_conntrack_tcp_timeout_close */
	KEEP_OPENING = 120,      /* nf_conntrack_tcp_timeout_syn_sent */
	KEEP_UDP = 120,          /* RFC 4787, REQ-5 */
	KEEP_UDP_BRIEF = 30,     /* nf_conntrack_udp_timeout: one way only, or no more than a question and its answer */
	KEEP_LEAST = 1,          /* also in a full table */
};

/* is_for says that what was read of an entry belongs to this key. */
static __always_inline bool is_for(const struct translation *entry, const struct tuple *key)
{
	return entry->was == short_of(key);
}

enum state { STATE_ALIVE, STATE_SPARE, STATE_EXPIRED };

/* state_of says whether a flow can go: STATE_EXPIRED at once, STATE_SPARE in a
 * full table: closed, never answered, or a datagram that was answered and no more. */
static __always_inline enum state state_of(const struct translation *client, const struct translation *reply,
					   __u8 protocol, __u32 now)
{
	__u32 client_idle = now - client->seen, reply_idle = now - reply->seen;
	__u32 idle = client_idle < reply_idle ? client_idle : reply_idle;
	__u32 both = client->flags & reply->flags, any = client->flags | reply->flags;
	bool answered = any & SEEN_REPLY, spare = !answered;
	__u32 keep;

	if (protocol == IPPROTO_UDP) {
		spare = !answered || !(any & SEEN_LATER);
		keep = spare ? KEEP_UDP_BRIEF : KEEP_UDP;
	} else if (any & SEEN_RST) {
		keep = KEEP_RESET;
		spare = true;
	} else if (both & SEEN_FIN) {
		keep = KEEP_CLOSED;
		spare = true;
	} else if (any & SEEN_FIN) {
		keep = KEEP_HALF_CLOSED;
	} else {
		keep = answered ? KEEP_OPEN : KEEP_OPENING;
	}
	if ((__s32)idle > (__s32)keep)
		return STATE_EXPIRED;
	return spare && (__s32)idle > KEEP_LEAST ? STATE_SPARE : STATE_ALIVE;
}

static __always_inline void count_flow(int by)
{
	__u32 zero = 0;
	struct usage *usage = bpf_map_lookup_elem(&flow_usage, &zero);

	if (usage)
		__sync_fetch_and_add(&usage->flows, by);
}

/* Beside translations, for clients from outside (masquerade.h). */
struct masquerade {
	struct tuple to; /* what the packet becomes */
	__u64 was;       /* short_of() the key */
};

/* Its size is set before load. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct tuple);
	__type(value, struct masquerade);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} masquerades SEC(".maps");

/* What is needed while a packet is translated, and a flow made or cleared away: too
 * much for the stack, which all functions on the way share. Programs at tc are not
 * interrupted by others on their CPU; sweep, which is run from a system call, may
 * be before Linux 6.10, and has a workbench of its own. */
struct workbench {
	struct packet packet;
	struct translation to;
	struct tuple from; /* what the client sends */
	struct translation client;
	struct translation reply;
	struct tuple back;   /* what the endpoint answers */
	struct tuple before; /* what the last endpoint of a flow that begins anew answers */
	struct tuple held;   /* vacate(): the key in a place, and that of its reply */
	struct tuple held_back;
	struct tuple origin;
	struct question asked;
	struct decision decision;
	__u32 by_wire;        /* the packet did not come from a pod of this node */
	__u32 made;           /* make_masquerade() made entries for this packet */
	struct tuple out_key; /* make_masquerade(): client -> endpoint */
	struct masquerade out;
	struct tuple in_key; /* endpoint -> node */
	struct masquerade in;
	struct tuple ended; /* drop_make_masquerade(): client -> endpoint */
	struct tuple ended_in;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct workbench);
	__uint(max_entries, 2);
} workbenches SEC(".maps");

enum { OF_PACKETS, OF_SWEEP };

static __always_inline struct workbench *workbench(__u32 of)
{
	return bpf_map_lookup_elem(&workbenches, &of);
}

/* drop_reply removes the entry of replies, if it is that of the flow with this key.
 * All three lie on a workbench. */
static __always_inline void drop_reply(const struct tuple *back, const struct tuple *key, struct tuple *origin)
{
	struct translation *reply = bpf_map_lookup_elem(&translations, back);

	if (!reply)
		return;
	reverse(&reply->to, origin);
	if (tuple_equal(origin, key))
		bpf_map_delete_elem(&translations, back);
}

/* drop_masquerade removes what was made for the packets w->ended, if anything. */
static __always_inline void drop_masquerade(struct workbench *w)
{
	struct masquerade *out = bpf_map_lookup_elem(&masquerades, &w->ended);

	if (!out)
		return;
	reverse(&out->to, &w->ended_in);
	bpf_map_delete_elem(&masquerades, &w->ended);
	bpf_map_delete_elem(&masquerades, &w->ended_in);
}

/* What vacate() found. */
enum { PLACE_TAKEN, PLACE_FREE, PLACE_FREED };

/* vacate makes a place free if the flow in it can go. It and those below are
 * global functions, so that each is verified once. */
__noinline int vacate(__u32 place, int pressed, __u32 of)
{
	struct tuple *held = bpf_map_lookup_elem(&places, &place);
	struct workbench *w = workbench(of);

	if (!held || !w)
		return PLACE_TAKEN;
	if (!held->protocol)
		return PLACE_FREE;
	w->held = *held;
	struct translation *client = bpf_map_lookup_elem(&translations, &w->held);

	if (!client)
		return PLACE_FREE;
	reverse(&client->to, &w->held_back);
	struct translation *reply = bpf_map_lookup_elem(&translations, &w->held_back);
	enum state state = state_of(client, reply ? reply : client, w->held.protocol, seconds());

	if (state == STATE_ALIVE || (state == STATE_SPARE && !pressed))
		return PLACE_TAKEN;
	if (state == STATE_SPARE)
		count(REASON_FLOW_CUT);
	w->ended = client->to;
	drop_masquerade(w);
	drop_reply(&w->held_back, &w->held, &w->origin);
	if (!bpf_map_delete_elem(&translations, &w->held))
		count_flow(-1);
	return PLACE_FREED;
}

/* How many vacant places a new flow tries, for another may have walked there
 * first; and how many places it walks over: half of them are given up only by
 * flows that have expired, the others also by those that can be spared. */
#define VACANT_TRIES 4
#define WALK_TRIES   64

/* take_place finds a place for the flow on the workbench; false if there is none. */
__noinline int take_place(void)
{
	struct workbench *w = workbench(OF_PACKETS);
	__u32 zero = 0, place;
	struct usage *usage = bpf_map_lookup_elem(&flow_usage, &zero);

	if (!usage || !w)
		return false;
	for (int i = 0; i < VACANT_TRIES + WALK_TRIES; i++) {
		int pressed = i >= VACANT_TRIES + WALK_TRIES / 2;

		if (i >= VACANT_TRIES || bpf_map_pop_elem(&vacant, &place))
			place = __sync_fetch_and_add(&usage->hand, 1) & places_mask;
		if (vacate(place, pressed, OF_PACKETS) == PLACE_TAKEN)
			continue;
		struct tuple *held = bpf_map_lookup_elem(&places, &place);

		if (held)
			*held = w->from;
		return true;
	}
	return false;
}
