// Package rollout takes a choice of settings through the nodes of a cluster, and keeps it
// on each: one node tries it for a time, then an eighth of the others have it, a quarter,
// half, all. One node on which something is worse afterwards stops it for all that have
// not begun, and puts back what it had newly set.
//
// All nodes know of a trial through one object of the API, a Lease, which each may alter
// only as it has read it. Decide says what becomes of it, and whether a node may set what
// is chosen; it is pure. Without an answer of the API server nothing new is set, and
// what is set is kept.
//
// It writes nothing in the kernel itself: a Node does. On disk it has one file, which
// says when a choice began here, and beside which pods. It costs what the Node does, and
// two requests a round: about 1 kB.
package rollout
