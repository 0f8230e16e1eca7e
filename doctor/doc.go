// Package doctor says what is wrong with a node's network, and with a cluster's objects
// that the network is made of. A Check is a value: what it reads, what it looks for,
// what that causes, and how to mend it. Host.Read takes the facts of a node once, twice
// for what is counted, from the node and from inside every network namespace on it;
// ReadCluster those of the API. Host.Probe sends a few packets from a node to others, to
// pods and to Services, for checks that are named and for no others. Run is pure, and
// gives each check's Result.
//
// It is not for what an application does. It changes nothing, and knows Kubernetes' types
// only by the few fields it reads.
//
// It needs root for the namespaces of others, and the verb list for objects; it says
// what it did not see without. What it costs is in docs/doctor.md, with the command that
// measures it.
package doctor
