//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Finds the sockets that are connected to an endpoint which the Service tables do
 * not lead to any more: run for each socket that remembers a flow (connect.bpf.c),
 * in whatever network namespace it is. Whether the endpoint is gone, or only not
 * ready, the agent knows.
 *
 * It is an object of its own: loaded when a backend has left the tables, and
 * again when those have moved to larger maps.
 */
#include "../../bpf/address.h"
#include "../../bpf/kernel.h"

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	struct sock *sk;
	void *value;
} __attribute__((preserve_access_index));

/* Where in a socket's flow, and in a backend, the fields are that are read. */
const volatile __u32 flow_size = 0;
const volatile __u32 flow_number = 0;
const volatile __u32 flow_address = 0;
const volatile __u32 flow_port = 0;
const volatile __u32 backend_address = 0;
const volatile __u32 backend_port = 0;

/* The layer's own, whose sizes are set before load. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} backends SEC(".maps");

/* What is told of a socket; its flow follows. */
struct steered {
	__u64 cookie;
	struct address local;
	__u32 netns; /* inode number */
	__u32 device;
	__u16 port; /* its own, in the order of the host */
	__u16 protocol;
	__u32 zero;
};

#define FAMILY_IP6 10 /* AF_INET6 */

enum { /* net/tcp_states.h; a connected UDP socket is in the first */
       TCP_ESTABLISHED = 1,
       TCP_SYN_SENT = 2,
       TCP_FIN_WAIT1 = 4,
       TCP_FIN_WAIT2 = 5,
       TCP_CLOSE_WAIT = 8,
};

/* waits says that a program has the socket and may wait for its peer. What was
 * closed by its program, the kernel ends by itself. */
static __always_inline bool waits(struct sock *sk)
{
	__u32 waiting =
	    1 << TCP_ESTABLISHED | 1 << TCP_SYN_SENT | 1 << TCP_FIN_WAIT1 | 1 << TCP_FIN_WAIT2 | 1 << TCP_CLOSE_WAIT;

	return sk->sk_socket && (waiting >> sk->__sk_common.skc_state & 1);
}

static __always_inline struct address mapped(__be32 ip)
{
	struct address a = { .word = { 0, 0, MAPPED_PREFIX, ip } };

	return a;
}

static __always_inline struct address address_of(struct in6_addr *from)
{
	struct address a = {
		.word = { from->in6_u.u6_addr32[0], from->in6_u.u6_addr32[1], from->in6_u.u6_addr32[2],
			  from->in6_u.u6_addr32[3] },
	};

	return a;
}

/* leads_to says whether a flow or a backend, as it lies in its map, is for this
 * address and port. */
static __always_inline bool leads_to(const char *address, const char *port, const struct address *to, __be16 to_port)
{
	return address_equal((const struct address *)address, to) && *(const __be16 *)port == to_port;
}

/* tell writes for the agent what was found, and the flow as it lies in its map. It
 * is a function so that the object describes the structure, for Go. */
static __noinline int tell(struct seq_file *to, const struct steered *found, const void *flow)
{
	bpf_seq_write(to, found, sizeof(*found));
	bpf_seq_write(to, flow, flow_size);
	return 0;
}

SEC("iter/bpf_sk_storage_map")
int find_steered(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	const char *flow = ctx->value;

	if (!sk || !flow || !waits(sk))
		return 0;
	struct sock_common *common = &sk->__sk_common;
	struct address peer = mapped(common->skc_daddr);
	struct steered found = { .local = mapped(common->skc_rcv_saddr) };
	__be16 port = common->skc_dport;

	if (common->skc_family == FAMILY_IP6) {
		if (!bpf_core_field_exists(common->skc_v6_daddr))
			return 0;
		peer = address_of(&common->skc_v6_daddr);
		found.local = address_of(&common->skc_v6_rcv_saddr);
	}
	/* the program may have connected it elsewhere since */
	if (!leads_to(flow + flow_address, flow + flow_port, &peer, port))
		return 0;
	__u32 number = *(const __u32 *)(flow + flow_number);
	const char *backend = bpf_map_lookup_elem(&backends, &number);

	/* an agent that starts may give a number again which was the last one */
	if (backend && leads_to(backend + backend_address, backend + backend_port, &peer, port))
		return 0;
	found.cookie = bpf_get_socket_cookie(sk);
	found.netns = common->skc_net.net->ns.inum;
	found.device = common->skc_bound_dev_if;
	found.port = common->skc_num;
	found.protocol = sk->sk_protocol;
	return tell(ctx->meta->seq, &found, flow);
}

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
