package dns

// The object and the Go types are made from names.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type name -type addresses -type outside_name -type known -type known_state -type search_list -type suffix -type authority -type outcome -type table -type resolver_list -type name_kind -type address -type seat -type handed -type given datapath names.bpf.c -- -O2 -fno-unroll-loops -Wall -Werror -mcpu=v3
