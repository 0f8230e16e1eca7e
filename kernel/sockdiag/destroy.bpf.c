//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Closes the sockets whose cookies are in a map, while the kernel walks over those
 * of the network namespace of the process that reads the walk. It says for each
 * that it closed which it was. For kernels without SOCK_DESTROY. */
#include "../../bpf/vmlinux.h"
#include <bpf/bpf_helpers.h>

/* Of the kernel's own types what is needed here. */
struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
} __attribute__((preserve_access_index));

struct sock_common {
	unsigned short skc_family;
} __attribute__((preserve_access_index));

struct udp_sock;

struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
} __attribute__((preserve_access_index));

struct bpf_iter__udp {
	struct bpf_iter_meta *meta;
	struct udp_sock *udp_sk;
} __attribute__((preserve_access_index));

extern int bpf_sock_destroy(struct sock_common *sk) __ksym;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u64);
	__type(value, __u8);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} condemned SEC(".maps");

static __always_inline int destroy(struct seq_file *seq, struct sock_common *sk)
{
	__u64 cookie = bpf_get_socket_cookie(sk);

	/* clang describes a type only where a field of it is read, and the kernel
	 * compares the descriptions of what its function is given */
	if (!sk->skc_family)
		return 0;
	if (bpf_map_lookup_elem(&condemned, &cookie) && !bpf_sock_destroy(sk))
		bpf_seq_write(seq, &cookie, sizeof(cookie));
	return 0;
}

SEC("iter/tcp")
int destroy_tcp(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	return sk ? destroy(ctx->meta->seq, sk) : 0;
}

SEC("iter/udp")
int destroy_udp(struct bpf_iter__udp *ctx)
{
	struct sock_common *sk = (struct sock_common *)ctx->udp_sk;

	return sk ? destroy(ctx->meta->seq, sk) : 0;
}

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
