// Package healthcheck answers on the ports on which load balancers and people ask
// a node how its service proxy does: healthCheckNodePort of each Service that has
// one, and kube-proxy's /healthz and /livez.
//
// [Of] says what the answers are, from a Snapshot; it is pure. [Server] is brought
// to a list of listeners: it opens what is missing, closes what is not wanted any
// more, exchanges answers without closing anything, and tries again what could not
// be opened, a port that somebody else has.
//
// The answers are those of kube-proxy's pkg/proxy/healthcheck: the same status
// codes, fields and headers, one listener for each family of a Service, and the
// endpoints of that family counted by address.
//
// It writes nothing in the kernel: listening sockets end with the process. A
// listener takes a file, a goroutine and 7 kB; a change in a cluster of 10,000
// Services, of which 100 have a port, 0.13 ms (go test -bench Snapshot).
package healthcheck
