package model

import "time"

// Conntrack is what is asked of a node's connection tracking; zero values ask for
// nothing.
type Conntrack struct {
	// MaxPerCore is how many connections can be tracked at once, for each processor,
	// and Min how many at least. Min alone asks for nothing.
	MaxPerCore, Min int64
	// TCPEstablished and TCPCloseWait are how long TCP connections in these states are
	// remembered without a packet.
	TCPEstablished, TCPCloseWait time.Duration
	// UDP is how long datagrams are remembered that nobody answered, UDPStream those
	// of a conversation.
	UDP, UDPStream time.Duration
	// TCPBeLiberal lets packets outside of the window belong to their connection.
	TCPBeLiberal bool
}
