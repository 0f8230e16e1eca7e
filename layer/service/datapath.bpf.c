//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* All programs of the layer in one object, because they share maps, settings and
 * decide(). Which of them are loaded is decided in Go. */
#include "connect.bpf.c"
#include "explain.bpf.c"
#include "measure.bpf.c"
#include "packet.bpf.c"

/* Whose endpoint is gone, and since when: no program asks for it, the agent keeps it
 * for the one after it (stuck.go). */
struct use {
	struct address service;
	struct address endpoint;
	__be16 service_port;
	__be16 endpoint_port;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct use); /* of TCP */
	__type(value, __u64);    /* nanoseconds since boot */
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} draining SEC(".maps");

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
