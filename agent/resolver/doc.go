// Package resolver answers DNS queries of pods that the kernel does not answer: names
// outside the cluster, which it asks the servers for that the cluster's DNS servers would
// ask, and of the cluster's zone the types that no program answers.
//
// It is for messages that the layers dns and nodedns hand up, and is no server: it has no socket that
// anybody could send to. It is not for what is not plain (DNSSEC, EDNS options but cookies, transfers),
// nor for what the cluster's DNS servers are configured to answer otherwise: those are
// handed back, and so is everything that nobody could be asked for. It never answers
// SERVFAIL, and never waits for longer than 2 s.
//
// What a server says is believed only as the answer to what it was asked: from its address,
// to a port and with an id by chance, with the same question; of the records, the aliases
// from the question on and what is at their end. Answers are kept for their TTL, negative
// ones too (RFC 2308), asked for anew before they end where pods ask for them, and given
// when they are old only where no server answers (RFC 8767).
//
// It writes nothing in the kernel; what it has learned it tells a Sink. It costs up to
// 16 MB of memory for answers, some 30 us of processor time for one that it has
// (BenchmarkKept, a busy machine), and for one that it has not what a socket costs.
package resolver
