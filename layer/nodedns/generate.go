package nodedns

// The object and the Go types are made from nodedns.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type detour -type presence -type family -type outcome -type address -type asker -type query datapath nodedns.bpf.c -- -O2 -Wall -Werror -mcpu=v3
