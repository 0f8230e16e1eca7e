/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Queries that the program has no answer to go to the agent while it is there, else to
 * the DNS Service.
 *
 * One that is taken waits, as it came, in a map that outlives the agent. The ring merely
 * wakes it. The agent gives it back to its device: as the answer, which goes on into the
 * pod, or as it came, if it does not know either; then it goes to the DNS Service as if
 * nobody had looked at it. What an agent leaves behind its successor finds.
 */
#pragma once

#include "../../bpf/packet.h"

/* A frame of a query: with a name of 255 bytes, an OPT record and a cookie of the longest
 * kind (RFC 7873, 4) it is one of 410. */
#define FRAME_LIMIT 416

/* So many queries of a device may wait; those behind them go to the DNS Service. A pod
 * cannot take another's. */
#define SEATS      64
#define SEAT_TRIES 8

struct seat {
	__u32 device;
	__u32 number;
};

struct handed {
	__u64 since; /* in nanoseconds since boot */
	__u32 asker; /* source port and id: who asks again goes to the DNS Service */
	__u32 length;
	__u8 frame[FRAME_LIMIT];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct seat);
	__type(value, struct handed);
	__uint(max_entries, 4096); /* 512 bytes each, while they wait */
	__uint(map_flags, BPF_F_NO_PREALLOC);
} waiting SEC(".maps");

/* Seats that were taken. A record takes 16 bytes: there is room for all. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} calls SEC(".maps");

/* A socket of the agent's. The kernel takes it out when the process ends, however that
 * may be. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} agents SEC(".maps");

/* When a device may have the next query taken, in nanoseconds since boot; 0 is all
 * devices (GCRA: ITU-T I.371, annex A). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} paces SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct handed);
	__uint(max_entries, 1);
} drafts SEC(".maps");

/* The time between two queries of a device, and of all, in nanoseconds; as many as BURST
 * may come at once. */
const volatile __u64 pace = 500000;
const volatile __u64 pace_all = 50000;
#define BURST     256
#define BURST_ALL 2048

/* Marks of packets that the agent gives back. A packet that leaves a network namespace
 * loses its mark, so that no pod can set one; it would only get its own packet back. */
#define MARK_ANSWER 0x6d726401
#define MARK_QUERY  0x6d726402

/* is_attended says whether an agent waits for queries: it is there, and has been heard of a
 * moment ago. */
static __always_inline bool is_attended(void)
{
	__u32 zero = 0;
	const struct authority *authority = bpf_map_lookup_elem(&authorities, &zero);
	struct bpf_sock *sk;

	if (!authority || !is_heard(authority, bpf_ktime_get_boot_ns()))
		return false;
	sk = bpf_map_lookup_elem(&agents, &zero);
	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* keeps_pace says whether a device, or all together, have not had too many taken. */
static __always_inline bool keeps_pace(__u32 device, __u64 now, __u64 between_two, __u32 burst)
{
	__u64 *due = bpf_map_lookup_elem(&paces, &device), next = now + between_two;

	if (!due)
		return !bpf_map_update_elem(&paces, &device, &next, BPF_ANY);
	if (*due > now + burst * between_two)
		return false;
	if (*due > now)
		next = *due + between_two;
	*due = next;
	return true;
}

/* is_query: one question, RD, AD and CD at most, and at most one additional record. What
 * it asks for the agent reads. */
static __always_inline bool is_query(const __u8 *message)
{
	return !(message[2] & ~0x01) && !(message[3] & ~0x30) && number_at(message + 4) == 1 &&
	       !number_at(message + 6) && !number_at(message + 8) && number_at(message + 10) <= 1;
}

/* sit finds a seat for a query. False if the client waits for its answer already, or
 * there is none. */
static __always_inline bool sit(struct handed *query, struct seat *seat)
{
	__u32 first = query->asker * 0x9e3779b1 >> 16;

	for (int i = 0; i < SEAT_TRIES; i++) {
		seat->number = (first + i) % SEATS;
		if (!bpf_map_update_elem(&waiting, seat, query, BPF_NOEXIST))
			return true;
		const struct handed *there = bpf_map_lookup_elem(&waiting, seat);

		if (there && there->asker == query->asker)
			return false;
	}
	return false;
}

/* hand_up takes a query to the agent. A global function, so that it is verified once.
 * It returns OUTCOME_HANDED, OUTCOME_CROWDED, or OUTCOME_COUNT if it is not for the agent. */
__noinline enum outcome hand_up(struct __sk_buff *skb, __u32 udp, __u32 length)
{
	__u32 zero = 0, size;
	struct handed *draft = bpf_map_lookup_elem(&drafts, &zero);
	struct seat seat = { .device = skb->ifindex }, *call;

	if (!draft || !is_attended())
		return OUTCOME_COUNT;
	if (!between(&udp, ETHERNET_LENGTH + 20, ETHERNET_LENGTH + 40) ||
	    !between(&length, DNS_HEADER + 5, FRAME_LIMIT - ETHERNET_LENGTH - 40 - UDP_HEADER))
		return OUTCOME_COUNT;
	size = udp + UDP_HEADER + length;
	if (!between(&size, 1, FRAME_LIMIT) || bpf_skb_load_bytes(skb, 0, draft->frame, size))
		return OUTCOME_COUNT;
	const __u8 *datagram = draft->frame + udp, *message = datagram + UDP_HEADER;

	if (!is_query(message))
		return OUTCOME_COUNT;
	draft->since = bpf_ktime_get_boot_ns();
	draft->length = size;
	draft->asker = number_at(datagram) << 16 | number_at(message);
	if (!keeps_pace(seat.device, draft->since, pace, BURST) || !keeps_pace(0, draft->since, pace_all, BURST_ALL))
		return OUTCOME_CROWDED;
	call = bpf_ringbuf_reserve(&calls, sizeof(*call), 0);
	if (!call)
		return OUTCOME_CROWDED;
	if (!sit(draft, &seat)) {
		bpf_ringbuf_discard(call, 0);
		return OUTCOME_CROWDED;
	}
	*call = seat;
	bpf_ringbuf_submit(call, 0);
	return OUTCOME_HANDED;
}

#define LOOPBACK 1 /* in every network namespace */

/* swallow does away with a packet that was taken. It is not dropped: who counts drops
 * would count it, for tcx knows no TC_ACT_STOLEN. ARP for another host the kernel frees
 * in silence (arp_rcv). */
static __always_inline int swallow(struct __sk_buff *skb)
{
	static const __u8 header[ETHERNET_LENGTH] = { 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x06 };

	if (bpf_skb_store_bytes(skb, 0, header, sizeof(header), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(LOOPBACK, BPF_F_INGRESS);
}

/* leave lets others answer: the agent, or the DNS Service. Where not all names are known
 * the agent knows no more than the program. */
static __always_inline int leave(struct __sk_buff *skb, const struct datagram *d, enum outcome outcome)
{
	if (outcome != OUTCOME_UNSURE) {
		__u32 up = hand_up(skb, d->udp, d->length);

		if (up == OUTCOME_HANDED) {
			count(OUTCOME_HANDED);
			return swallow(skb);
		}
		if (up == OUTCOME_CROWDED)
			outcome = OUTCOME_CROWDED;
	}
	return pass(outcome);
}

static __always_inline bool is_given_back(const struct __sk_buff *skb)
{
	return skb->mark == MARK_ANSWER || skb->mark == MARK_QUERY;
}

/* given_back sees at the pod's device what the agent gave back. */
static __always_inline int given_back(struct __sk_buff *skb)
{
	bool answer = skb->mark == MARK_ANSWER;

	skb->mark = 0;
	if (!answer)
		return pass(OUTCOME_BACK);
	if (!make_ours(skb)) {
		count(OUTCOME_LOST);
		return TC_ACT_SHOT;
	}
	count(OUTCOME_REPLIED);
	return bpf_redirect_peer(skb->ifindex, 0);
}

#define EINVAL 22 /* asm-generic/errno-base.h */

enum given {
	GIVEN,         /* to the device */
	GIVEN_TO_NONE, /* nobody waits there any more, or somebody else */
	GIVEN_NOWHERE, /* the device has gone */
	GIVEN_FAILED,  /* not now: the processor's queue is full, or the device is down */
};

/* dns_give_back is run by the agent with a frame, and gives it to the device of a query
 * that waits: its seat is in cb[0] and cb[1], since when it waits in cb[2] and cb[3], and
 * cb[4] says whether the frame is an answer, or the query. So the agent needs no raw socket,
 * and can send nothing to who has not asked. */
SEC("tc")
enum given dns_give_back(struct __sk_buff *skb)
{
	struct seat seat = { .device = skb->cb[0], .number = skb->cb[1] };
	const struct handed *query = bpf_map_lookup_elem(&waiting, &seat);
	long failed;

	if (!query || query->since != ((__u64)skb->cb[3] << 32 | skb->cb[2]))
		return GIVEN_TO_NONE;
	skb->mark = skb->cb[4] ? MARK_ANSWER : MARK_QUERY;
	failed = bpf_clone_redirect(skb, seat.device, BPF_F_INGRESS);
	if (failed)
		return failed == -EINVAL /* no such device */ ? GIVEN_NOWHERE : GIVEN_FAILED;
	bpf_map_delete_elem(&waiting, &seat);
	return GIVEN;
}
