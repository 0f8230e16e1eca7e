//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Says what would happen to a packet, and changes nothing: run by
 * BPF_PROG_TEST_RUN over the live Service tables and over maps of its own for all
 * else. It reads and decides with the functions of the programs in force.
 */
#include "../../bpf/packet.h"
#include "service.h"

struct explanation {
	enum origin origin; /* what is asked */
	struct packet packet;
	struct decision decision;
};

/* The question of the next run, and the answer to the last one. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct explanation);
	__uint(max_entries, 1);
} explained SEC(".maps");

SEC("tc")
int explain(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct explanation *answer = bpf_map_lookup_elem(&explained, &zero);

	if (!answer)
		return -1;
	__builtin_memset(&answer->packet, 0, sizeof(answer->packet));
	__builtin_memset(&answer->decision, 0, sizeof(answer->decision));
	read_packet(skb, &answer->packet, ETHERNET_LENGTH);
	if (answer->packet.shape != SHAPE_WHOLE && answer->packet.shape != SHAPE_FIRST)
		return VERDICT_NOT_A_SERVICE;

	struct question asked = {
		.key = {
			.address = answer->packet.tuple.destination,
			.port = answer->packet.tuple.destination_port,
			.protocol = answer->packet.tuple.protocol,
		},
		.client = answer->packet.tuple.source,
		.origin = answer->origin,
	};

	return decide(&asked, &answer->decision);
}
