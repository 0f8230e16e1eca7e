// Package doctor says what is wrong with a node's network. A Check is a value: what
// it reads, what it looks for, what that causes, and how to mend it. Read takes the
// facts once, twice for what is counted, from the node and from inside every network
// namespace on it; Run is pure, and gives each check's Result.
//
// It is not for whole clusters, and knows no Kubernetes objects. It changes nothing.
//
// It needs root for the namespaces of others, and says what it did not see without.
// What it costs is in docs/doctor.md, with the command that measures it.
package doctor
