//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What `bench program` takes as zero, and as the least that a decision can cost.
 * Never attached. */
#include "../../bpf/packet.h"
#include "service.h"

SEC("tc")
int nothing(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

/* The key is read from the packet as it lies there, TCP over IPv4 without
 * options, and looked up once in services. */
SEC("tc")
int one_look_up(struct __sk_buff *skb)
{
	struct ip4_header *ip = (void *)(long)skb->data + ETHERNET_LENGTH;
	__be16 *ports = (void *)(ip + 1);

	if ((void *)(ports + 2) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;

	struct service_key key = {
		.address = address_from_ip4(ip->destination),
		.port = ports[1],
		.protocol = ip->protocol,
	};

	return bpf_map_lookup_elem(&services, &key) ? TC_ACT_OK : TC_ACT_UNSPEC;
}
