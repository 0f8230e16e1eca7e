package service

// The object and the Go types are made from datapath.bpf.c by the pinned clang
// and committed, so that building needs Go only.
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -target bpfel -type service_key -type service -type slot_key -type backend -type reason -type schema_group -type schema_version -type service_path -type tuple -type translation -type usage -type explanation -type shape -type verdict -type role -type seen -type service_flags -type origin -type node_address -type port_range -type addresses -type source_range_key -type affinity_key -type affinity -type masquerade datapath datapath.bpf.c -- -O2 -Wall -Werror -mcpu=v3
