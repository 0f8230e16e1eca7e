package trace

// The object and the Go types are made from trace.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type event_key -type event -type example -type kind -type share_key -type flow_key -type flow -type ending -type test -type hop_key -type hop -type point trace trace.bpf.c -- -O2 -Wall -Werror -mcpu=v3
