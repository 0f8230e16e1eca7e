//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What pods send out of the cluster comes from the node's address, and the answers go back
 * to the pods.
 *
 *   pod -> stack -> masq_to_wire -> wire ~~~ wire -> masq_from_wire -> stack -> pod
 *
 * The source becomes the node's behind POSTROUTING, the destination the pod's before
 * PREROUTING. So the host's stack, connection tracking included, sees one consistent flow
 * between the pod and the world, and needs to know nothing of it.
 */
#include "../../bpf/echo.h"
#include "../../bpf/fragment.h"
#include "../../bpf/packet.h"
#include "../../bpf/rewrite.h"
#include "../../bpf/socket.h"
#include "flow.h"

char __license[] SEC("license") = "Dual MIT/GPL";

/* A range of addresses; length is in bits, of 128. */
struct range {
	__u32 length;
	struct address address;
};

enum range_flags {
	RANGE_OWN = 1,    /* of this node's pods: what comes from here is masqueraded */
	RANGE_NATIVE = 2, /* what goes here keeps its address */
};

/* Each has the flags of all ranges that it is in. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct range);
	__type(value, enum range_flags);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} ranges SEC(".maps");

/* The node's addresses at a device; all zero where there is none of a family. */
struct wire {
	struct address ip4;
	struct address ip6;
};

/* The devices by which packets leave the node. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32); /* the device's index */
	__type(value, struct wire);
	__uint(max_entries, 256);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} wires SEC(".maps");

/* What became of packets and flows. The names in metrics are read from this enum's BTF, in
 * lower case and without the prefix. */
enum outcome {
	OUTCOME_BEGUN,      /* a flow of a pod got a port of the node */
	OUTCOME_OUTSIDE,    /* a flow came to a pod's own address, so its answers keep it */
	OUTCOME_CUT,        /* a flow gave way that was closed, never answered or of one question: there was no room */
	OUTCOME_YIELDED,    /* a flow gave its port back, for the node itself speaks from it */
	OUTCOME_MOVED,      /* a flow ended, for its address is not the node's any more */
	OUTCOME_NO_PORT,    /* dropped: no free port was found towards the destination */
	OUTCOME_FULL,       /* dropped: the table of flows is full of flows that live */
	OUTCOME_NO_ADDRESS, /* dropped: the node has no address of the family at the device */
	OUTCOME_UNKNOWN,    /* dropped: neither TCP nor UDP nor a ping */
	OUTCOME_STRAY,      /* dropped: a reset, an ICMP error or a later fragment, of no flow */
	OUTCOME_UNWRITABLE, /* dropped: the kernel refused to change the packet */
	OUTCOME_COUNT,
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, enum outcome);
	__type(value, __u64);
	__uint(max_entries, OUTCOME_COUNT);
} outcomes SEC(".maps");

/* Towards whom no port was found. */
struct destination {
	struct address address;
	__be16 port;
	__u8 protocol;
	__u8 zero;
};

struct exhaustion {
	__u64 count;
	__u32 last; /* seconds since boot */
	__u32 zero;
};

/* The destinations for which that was longest ago are forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct destination);
	__type(value, struct exhaustion);
	__uint(max_entries, 256);
} exhausted SEC(".maps");

/* The source ports that are given: none that the kernel gives to sockets of the node, and
 * no node port. */
const volatile __u16 first_port = 1024;
const volatile __u16 port_count = 28976;

/* How many ports, and how many places, are tried; the second half of the tries also takes
 * those of flows that can be spared. The last quarter for places takes those of flows that
 * just began, too: who begins most loses most of them, and keeps nobody out. */
#define PORT_TRIES  64
#define PLACE_TRIES 64

#define EEXIST 17
#define E2BIG  7

/* What is needed for a packet: too much for the stack. Programs at tc are not interrupted
 * by others on their CPU; sweep, which is run from a system call, may be before Linux 6.10,
 * and has a workbench of its own. */
struct workbench {
	struct packet packet;
	struct flow flow; /* a copy of the packet's entry */
	struct tuple out_key;
	struct flow out;
	struct tuple in_key;
	struct flow in;
	struct tuple other; /* of a flow that may go: what its pod sends, ... */
	struct tuple back;  /* ... and what is answered */
	struct flow held;
	struct flow held_back;
	struct tuple to;
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

static __always_inline void count(enum outcome outcome)
{
	__u64 *n = bpf_map_lookup_elem(&outcomes, &outcome);

	if (n)
		(*n)++;
}

static __always_inline int drop(enum outcome outcome)
{
	count(outcome);
	return TC_ACT_SHOT;
}

/* A global function, so that it is verified once. */
__noinline int flags_of(const struct address *of)
{
	struct range key = { .length = 128 };

	if (!of)
		return 0;
	key.address = *of;
	enum range_flags *flags = bpf_map_lookup_elem(&ranges, &key);

	return flags ? *flags : 0;
}

/* is_group says that an address is that of many (RFC 1112; RFC 4291, 2.7), whose answers
 * come from other addresses. */
static __always_inline bool is_group(const struct address *a)
{
	__u8 first = is_ip4(a) ? a->word[3] & 0xff : a->word[0] & 0xff;

	return is_ip4(a) ? first >> 4 == 14 || a->word[3] == 0xffffffff : first == 0xff;
}

/* stays says that what goes to an address keeps its own. */
static __always_inline bool stays(const struct address *to)
{
	return is_group(to) || flags_of(to) & RANGE_NATIVE;
}

/* find copies the entry for a tuple; NULL if there is none. */
static __always_inline struct flow *find(const struct tuple *key, struct flow *copy)
{
	struct flow *entry = bpf_map_lookup_elem(&flows, key);

	if (!entry)
		return 0;
	*copy = *entry;
	return copy->was == short_of(key) ? entry : 0;
}

/* alter sets and clears flags in the other entry of a packet's flow, too. */
static __noinline int alter(struct workbench *w, __u32 set, __u32 clear)
{
	struct flow *entry = bpf_map_lookup_elem(&flows, &w->packet.tuple);

	if (!entry)
		return 0;
	__sync_fetch_and_or(&entry->flags, set);
	__sync_fetch_and_and(&entry->flags, ~clear);
	reverse(&w->flow.to, &w->back);
	entry = bpf_map_lookup_elem(&flows, &w->back);
	if (!entry)
		return 0;
	__sync_fetch_and_or(&entry->flags, set);
	__sync_fetch_and_and(&entry->flags, ~clear);
	return 0;
}

/* seen_of is what a packet says of its flow, but for a reset. */
static __always_inline __u32 seen_of(const struct packet *p)
{
	__u8 tcp = p->tcp_flags;
	__u32 seen = SEEN_PACKET;

	if (tcp & TCP_FIN)
		seen |= SEEN_FIN;
	if (p->tuple.protocol == IPPROTO_TCP && p->shape != SHAPE_LATER && !(tcp & (TCP_SYN | TCP_RST)))
		seen |= SEEN_OPEN;
	return seen;
}

/* note remembers what a packet says of its flow. Most packets write nothing. A reset is
 * forgotten when another packet follows: who does not heed it, for it is old or forged,
 * answers (RFC 5961, 3.2). A SYN after the end begins anew. It returns whether the packet
 * is the first of its second. */
static __always_inline bool note(struct flow *entry, struct workbench *w, bool of_pod)
{
	const __u32 reset = SEEN_RST | SEEN_RST_OF_POD;
	__u8 tcp = w->packet.tcp_flags;
	__u32 now = seconds(), flags = entry->flags, add = seen_of(&w->packet);

	if (entry->seen != now) {
		entry->seen = now;
		add |= SEEN_LATER;
	}
	if ((flags & add) != add)
		__sync_fetch_and_or(&entry->flags, add);
	if (tcp & TCP_RST)
		alter(w, of_pod ? reset : SEEN_RST, 0);
	else if ((tcp & (TCP_SYN | TCP_ACK)) == TCP_SYN && flags & (SEEN_FIN | SEEN_RST))
		alter(w, 0, SEEN_FIN | SEEN_OPEN | reset);
	else if (flags & SEEN_RST)
		alter(w, 0, reset);
	return add & SEEN_LATER;
}

/* vacate takes the flow with the key w->other out of the table if it can go; it says
 * whether that place, or the key, is free. Only what is in the state wanted, or past it, goes. */
__noinline int vacate(enum state wanted, __u32 of, __u32 at)
{
	struct workbench *w = workbench(of);

	if (!w)
		return false;
	if (!find(&w->other, &w->held) || (at != ANY_PLACE && w->held.place != at))
		return true;
	reverse(&w->held.to, &w->back);
	if (!find(&w->back, &w->held_back))
		w->held_back = w->held;
	enum state state = state_of(&w->held, &w->held_back, &w->other, seconds());

	if (state < wanted)
		return false;
	if (state < STATE_EXPIRED)
		count(OUTCOME_CUT);
	bpf_map_delete_elem(&flows, &w->back);
	bpf_map_delete_elem(&flows, &w->other);
	return true;
}

/* claim takes a place for the flow with the key w->out_key, until settle_down. Of two
 * processors one gets it. */
static __always_inline bool claim(struct workbench *w, __u32 at, enum state wanted)
{
	struct place *place = bpf_map_lookup_elem(&places, &at);

	if (!place)
		return false;
	__u32 claims = *(volatile __u32 *)&place->claims;

	w->other = place->holder;
	if (claims & 1 || (w->other.protocol && !vacate(wanted, OF_PACKETS, at)))
		return false;
	place = bpf_map_lookup_elem(&places, &at);
	if (!place || __sync_val_compare_and_swap(&place->claims, claims, claims + 1) != claims)
		return false;
	place->holder = w->out_key;
	w->out.place = at;
	return true;
}

/* take_place finds a place for the flow with the key w->out_key; false if none was found. */
__noinline int take_place(void)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return false;
	for (int i = 0; i < PLACE_TRIES; i++) {
		enum state wanted = STATE_EXPIRED;

		if (i >= PLACE_TRIES / 4 * 3)
			wanted = STATE_YOUNG;
		else if (i >= PLACE_TRIES / 2)
			wanted = STATE_SPARE;
		if (claim(w, bpf_get_prandom_u32() & places_mask, wanted))
			return true;
	}
	return false;
}

/* settle_down ends the claim of w->out: its flow is in the table, or will not be. */
static __always_inline void settle_down(struct workbench *w)
{
	__u32 at = w->out.place;
	struct place *place = bpf_map_lookup_elem(&places, &at);

	if (place)
		__sync_fetch_and_add(&place->claims, 1);
}

/* give_up makes w->in_key free, whose entry is taken, if its flow can go, or has gone and
 * left it behind: a flow that is being made has an entry here before it has the other. */
static __always_inline bool give_up(struct workbench *w, const struct flow *taken, enum state wanted)
{
	if ((__s32)(seconds() - taken->seen) <= KEEP_LEAST)
		return false;
	reverse(&taken->to, &w->other);
	if (!vacate(wanted, OF_PACKETS, ANY_PLACE) && tuple_equal(&w->back, &w->in_key))
		return false;
	bpf_map_delete_elem(&flows, &w->in_key);
	return true;
}

/* try_port tries a random port for the flow on the workbench, whose w->out.to is the node's
 * packet but for the port. It returns 0, or the error for which it cannot be had. */
__noinline int try_port(struct __sk_buff *skb, enum state wanted)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return -E2BIG;
	__u16 port = first_port + (((__u64)bpf_get_prandom_u32() * port_count) >> 32);

	w->out.to.source_port = __builtin_bswap16(port);
	reverse(&w->out.to, &w->in_key);
	w->in.was = short_of(&w->in_key);
	struct flow *taken = bpf_map_lookup_elem(&flows, &w->in_key);

	if (taken && !give_up(w, taken, wanted))
		return -EEXIST;
	if (w->out_key.protocol == IPPROTO_TCP || w->out_key.protocol == IPPROTO_UDP) {
		if (!is_free(skb, &w->in_key))
			return -EEXIST;
	}
	return bpf_map_update_elem(&flows, &w->in_key, &w->in, BPF_NOEXIST);
}

static __always_inline void count_exhausted(const struct tuple *out)
{
	struct destination to = { .address = out->destination,
				  .port = out->destination_port,
				  .protocol = out->protocol };
	struct exhaustion first = { .count = 1, .last = seconds() };
	struct exhaustion *known = bpf_map_lookup_elem(&exhausted, &to);

	count(OUTCOME_NO_PORT);
	if (known) {
		__sync_fetch_and_add(&known->count, 1);
		known->last = first.last;
	} else {
		bpf_map_update_elem(&exhausted, &to, &first, BPF_ANY);
	}
}

/* lay_out puts a new flow on the workbench, of which the packet there is the first. */
static __always_inline void lay_out(struct __sk_buff *skb, struct workbench *w, bool to_wire)
{
	__builtin_memset(&w->out, 0, sizeof(w->out));
	__builtin_memset(&w->in, 0, sizeof(w->in));
	w->out.seen = w->in.seen = seconds();
	w->out.device = w->in.device = skb->ifindex;
	if (to_wire) {
		w->out_key = w->packet.tuple;
		w->out.flags = seen_of(&w->packet);
		reverse(&w->out_key, &w->in.to);
		w->out.to = w->out_key;
	} else {
		reverse(&w->packet.tuple, &w->out_key);
		w->in.flags = seen_of(&w->packet);
	}
	w->out.was = short_of(&w->out_key);
}

/* begin gives the flow of a pod's packet an address and a port of the node. It returns
 * what becomes of the packet if that is to be dropped, else TC_ACT_OK; what it is to
 * become is in w->out then. */
__noinline int begin(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);
	__u32 device = skb->ifindex;
	struct wire *wire = bpf_map_lookup_elem(&wires, &device);
	long error = -EEXIST;

	if (!w || !wire)
		return drop(OUTCOME_NO_ADDRESS);
	lay_out(skb, w, true);
	w->out.to.source = w->packet.ip4 ? wire->ip4 : wire->ip6;
	if (!w->out.to.source.word[3] && !w->out.to.source.word[0])
		return drop(OUTCOME_NO_ADDRESS);
	for (int i = 0; i < PORT_TRIES && error == -EEXIST; i++)
		error = try_port(skb, i < PORT_TRIES / 2 ? STATE_EXPIRED : STATE_SPARE);
	if (error == -EEXIST) {
		count_exhausted(&w->out_key);
		return TC_ACT_SHOT;
	}
	if (error)
		return drop(OUTCOME_FULL);
	if (!take_place()) {
		bpf_map_delete_elem(&flows, &w->in_key);
		return drop(OUTCOME_FULL);
	}
	error = bpf_map_update_elem(&flows, &w->out_key, &w->out, BPF_NOEXIST);
	settle_down(w);
	if (error) {
		bpf_map_delete_elem(&flows, &w->in_key);
		/* the same flow's next packet was faster, on another CPU */
		if (error == -EEXIST && find(&w->out_key, &w->out))
			return TC_ACT_OK;
		return drop(OUTCOME_FULL);
	}
	count(OUTCOME_BEGUN);
	return TC_ACT_OK;
}

/* begin_outside remembers that the flow of a packet was begun outside, with the address of
 * the pod. */
__noinline int begin_outside(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return 0;
	lay_out(skb, w, false);
	w->in_key = w->packet.tuple;
	w->in.to = w->in_key;
	w->in.was = short_of(&w->in_key);
	w->out.to = w->out_key;
	if (!take_place()) {
		count(OUTCOME_FULL);
		return 0;
	}
	if (!bpf_map_update_elem(&flows, &w->in_key, &w->in, BPF_NOEXIST)) {
		if (bpf_map_update_elem(&flows, &w->out_key, &w->out, BPF_NOEXIST))
			bpf_map_delete_elem(&flows, &w->in_key);
		else
			count(OUTCOME_OUTSIDE);
	}
	settle_down(w);
	return 0;
}

/* write makes a packet another one. */
static __always_inline int write(struct __sk_buff *skb, struct workbench *w, const struct tuple *to)
{
	const struct packet *p = &w->packet;
	bool ping = is_icmp(p) && p->shape != SHAPE_LATER;

	if (ping ? rewrite_echo(skb, p, to) : rewrite(skb, p, to))
		return TC_ACT_UNSPEC;
	return drop(OUTCOME_UNWRITABLE);
}

/* write_error makes an ICMP error one about another packet, from one address to another. */
static __always_inline int write_error(struct __sk_buff *skb, struct workbench *w, const struct address *source,
				       const struct address *destination)
{
	if (is_icmp(&w->packet) && !keep_number(skb, &w->packet, &w->to))
		return drop(OUTCOME_UNWRITABLE);
	if (!rewrite_error(skb, &w->packet, &w->to, source, destination))
		return drop(OUTCOME_UNWRITABLE);
	return TC_ACT_UNSPEC;
}

/* gives_way ends the flow that has the port from which the node itself has just sent to
 * the same destination, by the same device: the node's answers are not to go to a pod. */
static __always_inline void gives_way(struct __sk_buff *skb, struct workbench *w)
{
	const struct packet *p = &w->packet;

	if ((__u16)(from_be16(p->tuple.source_port) - first_port) >= port_count)
		return;
	reverse(&p->tuple, &w->in_key);
	if (!find(&w->in_key, &w->flow) || is_as_it_is(&w->flow, &w->in_key) || w->flow.device != skb->ifindex)
		return;
	reverse(&w->flow.to, &w->other);
	bpf_map_delete_elem(&flows, &w->other);
	bpf_map_delete_elem(&flows, &w->in_key);
	count(OUTCOME_YIELDED);
}

/* error_to_wire sees ICMP errors about answers from the world: of a pod, or of the node,
 * which saw them with the pod's address. */
static __always_inline int error_to_wire(struct __sk_buff *skb, struct workbench *w)
{
	struct packet *p = &w->packet;

	reverse(&p->tuple, &w->out_key);
	if (!find(&w->out_key, &w->flow)) {
		bool leaks = flags_of(&p->outer_source) & RANGE_OWN && !stays(&p->outer_destination);

		return leaks ? drop(OUTCOME_STRAY) : TC_ACT_UNSPEC;
	}
	bool of_pod = flags_of(&p->outer_source) & RANGE_OWN;

	/* a pod speaks of its own flows, and to who is in them */
	if ((of_pod && !address_equal(&p->outer_source, &w->out_key.source)) ||
	    !address_equal(&p->outer_destination, &w->out_key.destination))
		return drop(OUTCOME_STRAY);
	if (is_as_it_is(&w->flow, &w->out_key))
		return TC_ACT_UNSPEC;
	reverse(&w->flow.to, &w->to);
	return write_error(skb, w,
			   address_equal(&p->outer_source, &w->out_key.source) ? &w->flow.to.source : &p->outer_source,
			   &p->outer_destination);
}

/* error_from_wire sees ICMP errors about what pods sent. */
static __always_inline int error_from_wire(struct __sk_buff *skb, struct workbench *w)
{
	struct packet *p = &w->packet;

	reverse(&p->tuple, &w->in_key);
	if (!find(&w->in_key, &w->flow) || is_as_it_is(&w->flow, &w->in_key))
		return TC_ACT_UNSPEC;
	reverse(&w->flow.to, &w->to);
	return write_error(skb, w, &p->outer_source, &w->to.source);
}

/* asks says whether a ping is a request: its identifier may be 0. */
static __always_inline bool asks(struct __sk_buff *skb, const struct packet *p)
{
	__u8 type = ICMP_ECHO_REPLY;

	if (p->shape == SHAPE_LATER || bpf_skb_load_bytes(skb, p->transport - ECHO_ID, &type, sizeof(type)))
		return false;
	return type == (p->ip4 ? ICMP_ECHO_REQUEST : ICMP6_ECHO_REQUEST);
}

/* begins says whether a packet without a flow can be the first of one. */
static __always_inline bool begins(struct __sk_buff *skb, const struct packet *p)
{
	if (p->tuple.protocol == IPPROTO_TCP)
		return (p->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
	return !is_icmp(p) || asks(skb, p);
}

/* is_elsewhere says that the kernel would send packets for an address away: it is not, or
 * not any more, the node's. */
static __noinline bool is_elsewhere(struct __sk_buff *skb, const struct address *of)
{
	struct bpf_fib_lookup way = { .ifindex = skb->ifindex, .family = AF_INET6 };

	if (is_ip4(of)) {
		way.family = AF_INET;
		way.destination[0] = of->word[3];
	} else {
		__builtin_memcpy(way.destination, of, sizeof(way.destination));
	}
	switch (bpf_fib_lookup(skb, &way, sizeof(way), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		return true;
	}
	return false;
}

/* moves ends the flow w->flow of a pod's packet if its address is not the node's any more:
 * no answer would come back. That its device has got another one says nothing yet. */
static __noinline bool moves(struct __sk_buff *skb, struct workbench *w)
{
	const struct address *source = &w->flow.to.source;
	__u32 device = w->flow.device;
	struct wire *wire = bpf_map_lookup_elem(&wires, &device);

	if (is_as_it_is(&w->flow, &w->packet.tuple))
		return false;
	if (wire && address_equal(source, w->packet.ip4 ? &wire->ip4 : &wire->ip6))
		return false;
	if (!is_elsewhere(skb, source))
		return false;
	reverse(&w->flow.to, &w->back);
	bpf_map_delete_elem(&flows, &w->back);
	bpf_map_delete_elem(&flows, &w->packet.tuple);
	count(OUTCOME_MOVED);
	return true;
}

/* leaves_first sees a packet of a pod that has no flow. It returns TC_ACT_OK if it has one
 * then, in w->flow. */
static __always_inline int leaves_first(struct __sk_buff *skb, struct workbench *w)
{
	struct packet *p = &w->packet;

	if (stays(&p->tuple.destination))
		return TC_ACT_UNSPEC;
	/* A connection that was forgotten, or somebody else's before, gets a port: its
	 * other end resets it at once, where silence would take minutes. */
	if (p->tcp_flags & TCP_RST || (is_icmp(p) && !asks(skb, p)))
		return drop(OUTCOME_STRAY);
	if (begin(skb) != TC_ACT_OK)
		return TC_ACT_SHOT;
	w->flow = w->out;
	return TC_ACT_OK;
}

/* leaves sees a packet of a pod of which the tuple is whole. */
static __always_inline int leaves(struct __sk_buff *skb, struct workbench *w)
{
	struct packet *p = &w->packet;
	struct flow *entry = find(&p->tuple, &w->flow);
	int verdict = TC_ACT_OK;

	if (!entry || (note(entry, w, true) && moves(skb, w)))
		verdict = leaves_first(skb, w);
	if (verdict != TC_ACT_OK)
		return verdict;
	if (p->shape == SHAPE_FIRST)
		keep_fragment(p, false);
	if (is_as_it_is(&w->flow, &p->tuple))
		return TC_ACT_UNSPEC;
	return write(skb, w, &w->flow.to);
}

static __always_inline int to_wire(struct __sk_buff *skb, __u32 frame)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	if (of_vlan(skb))
		return TC_ACT_UNSPEC;
	struct packet *p = &w->packet;

	read_packet(skb, p, frame);
	read_echo(skb, p);
	if (p->shape == SHAPE_ERROR)
		return error_to_wire(skb, w);
	bool inside = p->icmp; /* tuple is that of the packet inside */

	if (!(flags_of(inside ? &p->outer_source : &p->tuple.source) & RANGE_OWN)) {
		if (p->shape == SHAPE_WHOLE || p->shape == SHAPE_FIRST)
			gives_way(skb, w);
		return TC_ACT_UNSPEC;
	}
	if (p->shape == SHAPE_OTHER)
		return stays(inside ? &p->outer_destination : &p->tuple.destination) ? TC_ACT_UNSPEC
										     : drop(OUTCOME_UNKNOWN);
	if (p->shape == SHAPE_LATER && !find_fragment(p, false))
		return stays(&p->tuple.destination) ? TC_ACT_UNSPEC : drop(OUTCOME_STRAY);
	return leaves(skb, w);
}

/* comes_to_pod says whether a packet that begins a flow goes to a pod's own address, from
 * outside. */
static __always_inline bool comes_to_pod(struct __sk_buff *skb, const struct packet *p)
{
	__u32 device = skb->ifindex;
	struct wire *wire = bpf_map_lookup_elem(&wires, &device);

	if (!begins(skb, p) || !wire || address_equal(&p->tuple.destination, p->ip4 ? &wire->ip4 : &wire->ip6))
		return false;
	return flags_of(&p->tuple.destination) & RANGE_OWN && !stays(&p->tuple.source);
}

static __always_inline int from_wire(struct __sk_buff *skb, __u32 frame)
{
	struct workbench *w = workbench(OF_PACKETS);

	if (!w)
		return TC_ACT_SHOT;
	if (skb->pkt_type == PACKET_OTHERHOST || of_vlan(skb))
		return TC_ACT_UNSPEC; /* a switch that floods: it is another machine's */
	struct packet *p = &w->packet;

	read_packet(skb, p, frame);
	read_echo(skb, p);
	if (p->shape == SHAPE_ERROR)
		return error_from_wire(skb, w);
	if (p->shape == SHAPE_OTHER || (p->shape == SHAPE_LATER && !find_fragment(p, true)))
		return TC_ACT_UNSPEC;
	struct flow *entry = find(&p->tuple, &w->flow);

	if (!entry) {
		if (comes_to_pod(skb, p))
			begin_outside(skb);
		return TC_ACT_UNSPEC;
	}
	note(entry, w, false);
	if (p->shape == SHAPE_FIRST)
		keep_fragment(p, true);
	if (is_as_it_is(&w->flow, &p->tuple))
		return TC_ACT_UNSPEC;
	return write(skb, w, &w->flow.to);
}

SEC("tcx/egress")
int masq_to_wire(struct __sk_buff *skb)
{
	return to_wire(skb, ETHERNET_LENGTH);
}

SEC("tcx/ingress")
int masq_from_wire(struct __sk_buff *skb)
{
	return from_wire(skb, ETHERNET_LENGTH);
}

/* The same at devices that carry IP packets and nothing before them: WireGuard, IPIP, tun,
 * PPP. */
SEC("tcx/egress")
int masq_to_l3(struct __sk_buff *skb)
{
	return to_wire(skb, 0);
}

SEC("tcx/ingress")
int masq_from_l3(struct __sk_buff *skb)
{
	return from_wire(skb, 0);
}

/* How many places sweep looks at in one run. */
#define SWEEP_PLACES 256

/* The agent runs sweep to give memory back: the frame begins with the first place. It
 * returns how many flows it found that live. */
SEC("tc")
int masq_sweep(struct __sk_buff *skb)
{
	struct workbench *w = workbench(OF_SWEEP);
	__u32 first;
	int alive = 0;

	if (!w || bpf_skb_load_bytes(skb, 0, &first, sizeof(first)))
		return 0;
	for (__u32 i = 0; i < SWEEP_PLACES && i <= places_mask; i++) {
		__u32 at = (first + i) & places_mask;
		struct place *place = bpf_map_lookup_elem(&places, &at);

		if (!place)
			return alive;
		w->other = place->holder;
		if (w->other.protocol)
			alive += !vacate(STATE_EXPIRED, OF_SWEEP, at);
	}
	return alive;
}
