// Package model says in plain values what a cluster asks of this node:
// Services and where they lead, Pods, Nodes, and the workloads that pods come
// from. A Snapshot holds them all.
//
// It is for wishes only: nothing here reads a clock, a file or the kernel, and
// nothing here knows Kubernetes' own Go types. Sources (source/...) make
// Snapshots, layers (layer/...) plan from them, the lab makes its own.
//
// It writes nothing in the kernel. It costs memory only: about 300 bytes a
// Service and 100 bytes an endpoint.
//
// Values reached through a Snapshot are immutable. A source that keeps an
// object unchanged from one Snapshot to the next hands out the same pointer, so
// that a reader finds what changed by comparing pointers.
package model
