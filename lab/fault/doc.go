// Package fault breaks networks on purpose: it makes small ones of network
// namespaces, with healthy traffic in them, induces one or two faults of a list, and
// sends what meets them. Whoever looks for the cause meanwhile is judged by what was
// induced. `millrace lab faults` and `make faults` are made of it.
//
// A fault says in itself whether it took: what its application must have seen. One
// that did not take counts neither as found nor as missed.
//
// What it writes: namespaces below /run/netns with names that nobody else has, and,
// inside of these, links, addresses, routes, neighbours, settings, rules, programs and
// entries of connection tracking; one group below millrace-fault in the cgroup2
// hierarchy for the one fault that needs it. Nothing is changed in the host's own
// network namespace, and Close removes everything; what a killed process left, Sweep
// removes, which finds the names in /run/millrace/fault. Rules of firewalls are made by the
// front ends that people use (nft, iptables-nft, iptables-legacy), because what these
// leave in the kernel is what has to be recognised; a fault whose program is not
// installed is not run, and says so.
//
// It costs three namespaces and about a tenth of a second a scene; the fault that fills
// a table of connection tracking makes as many entries as the kernel takes.
package fault
