package masquerade

// The object and the Go types are made from masquerade.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type range -type range_flags -type wire -type flow -type tuple -type seen -type destination -type exhaustion -type outcome -type address datapath masquerade.bpf.c -- -O2 -Wall -Werror -mcpu=v3
