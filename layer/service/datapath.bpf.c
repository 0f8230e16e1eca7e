//go:build ignore

// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* All programs of the layer in one object, because they share maps, settings and
 * decide(). Which of them are loaded is decided in Go. */
#include "connect.bpf.c"
#include "explain.bpf.c"
#include "measure.bpf.c"
#include "packet.bpf.c"

/* The kernel gives some of its helpers to GPL-compatible programs only. */
char __license[] SEC("license") = "Dual MIT/GPL";
