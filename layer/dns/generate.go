package dns

// The object and the Go types are made from names.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type name -type addresses -type authority -type outcome -type name_kind -type address datapath names.bpf.c -- -O2 -Wall -Werror -mcpu=v3
