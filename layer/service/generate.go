package service

// The object and the Go types are made from connect.bpf.c by the pinned clang
// and committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type service_key -type service -type slot_key -type backend -type reason datapath connect.bpf.c -- -O2 -Wall -Werror -mcpu=v3
