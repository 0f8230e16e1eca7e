// Package tune keeps settings of the node's kernel as somebody asked for: today those
// of connection tracking that the configuration of a kube-proxy names. Who asks for
// nothing gets nothing written.
//
// What it writes in the kernel: the files below /proc/sys/net/netfilter that docs/tune.md
// lists. Before the first of them is written, the values before are in a journal in
// the layer's folder, so that a process that is killed at any moment leaves what can
// be undone. The journal is of one boot, as the settings are.
//
// What it costs: nothing where packets pass. Reading seven files when it begins and
// once a minute, about 0.3 milliseconds; no goroutine.
//
// What somebody else sets instead is set again, and told as drift. Who sets it back
// again and again wins: after three times in ten minutes it is left, and told. A
// setting that cannot be written is told too, and is no failure of the node's
// network.
//
// Off means gone: Remove puts back each value that is still what this layer wrote,
// and so does Apply with a setting that is no longer asked for. What somebody else
// has set since stays, and is named.
//
// Beside the layer, which is the agent's, it has what `millrace tune` is made of: Look
// reads a node, package knob says what should become of it, and a Ledger sets that and
// puts it back. These cost nothing while nobody calls them; a Look at one
// namespace takes its window and 70 milliseconds on a busy machine (-bench Look).
package tune
