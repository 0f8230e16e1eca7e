package route

// The object and the Go types are made from route.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type range -type remote -type vtep -type network -type outcome -type address -type home datapath route.bpf.c -- -O2 -Wall -Werror -mcpu=v3
