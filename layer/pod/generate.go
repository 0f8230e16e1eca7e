package pod

// The object and the Go types are made from shortcut.bpf.c by the pinned clang and
// committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type home -type crossing -type address datapath shortcut.bpf.c -- -O2 -Wall -Werror -mcpu=v3
