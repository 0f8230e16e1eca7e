// Calls asks Services without end and counts exactly what becomes of the calls, and
// serves such calls: the traffic of tests that must see every failure.
//
//	calls serve [--linger 10s]                 answers TCP and UDP on port 8080
//	calls call [flags] NAME/KIND=ADDRESS:PORT ...
//
// A request is a line with a number, its answer the number and the server's name. A
// server that was told to end goes on for --linger and says "bye" with each answer:
// clients of its connections then open another one. So nobody notices an end in
// good order. Readiness is asked for at http://:8081/ready, and altered by /unready
// and /ready-again.
//
// The kinds of calls:
//
//	tcp        a connection for each request
//	tcp-long   one connection for all; an answer is waited for as long as --patience
//	udp        one socket, which does not connect
//	udp-long   one socket, which is connected until it meets an error
//
// Call writes a line of JSON for each call that failed, and one a second with what
// was asked since, and how long the quietest of all targets has had no answer. It
// ends when its standard input does, with --stdin. Its sockets are those of the
// kernel, without Go's poller, so that a call that failed can still be asked where
// it was led.
//
// It changes nothing, and costs 0.15 ms of processor time for a request at both ends
// together, on a busy machine.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: calls serve|call [flags] [targets]")
		os.Exit(2)
	}
	var err error
	switch arguments := os.Args[2:]; os.Args[1] {
	case "serve":
		err = serve(arguments)
	case "call":
		err = call(arguments)
	default:
		err = fmt.Errorf("%s: it is serve or call", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "calls:", err)
		os.Exit(1)
	}
}
