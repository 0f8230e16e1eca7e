package fault

import (
	"net"
	"net/netip"
	"time"
)

// askedInVain is how long neighbours are asked for before they count as missing: three
// questions, a second apart.
const askedInVain = 4500 * time.Millisecond

// nobodyThere takes a server that does not exist, behind the router or beside the client.
func nobodyThere(beside bool) func(*Part) error {
	return func(p *Part) error {
		p.to = p.host(p.distant[p.i()])
		if beside {
			p.to = p.host(p.near[p.i()])
			p.blame(p.client)
		}
		return nil
	}
}

// wrongMAC gives the router a stale hardware address of the server.
func wrongMAC(p *Part) error {
	p.blame(p.router, p.server)
	mac := net.HardwareAddr{2, byte(p.random.IntN(256)), byte(p.random.IntN(256)), byte(p.random.IntN(256)), byte(p.random.IntN(256)), 9}
	return p.router.neigh(p.router.far, p.to, mac)
}

// peerDown sets the server's device down.
func peerDown(p *Part) error {
	p.blame(p.router, p.server)
	l, err := p.server.link(p.server.device)
	if err != nil {
		return err
	}
	return p.server.net.LinkSetDown(l)
}

// twice gives the server the client's address, too.
func twice(p *Part) error {
	p.blame(p.server)
	return p.server.addr(p.server.device, netip.PrefixFrom(p.from, p.from.BitLen()))
}

var neighbourFaults = []*Fault{
	{Name: "neighbour-missing", behind: true, Number: "07", Says: "Nobody has the address that the router asks for.",
		Causes: []string{"neighbour-unresolved"}, Seen: []Outcome{Unreachable, Timeout, Silent}, window: askedInVain, induce: nobodyThere(false), send: callsOrQuestions},
	{Name: "neighbour-missing-on-link", Number: "07b", Says: "Nobody has the address that the client asks for on its own link.",
		Causes: []string{"neighbour-unresolved"}, Seen: []Outcome{Unreachable, Timeout, Silent}, window: askedInVain, induce: nobodyThere(true), send: callsOrQuestions},
	{Name: "wrong-mac", behind: true, Number: "24", Says: "The router has a stale hardware address of the server.",
		Causes: []string{"wrong-mac-address"}, Seen: []Outcome{Timeout, Silent}, induce: serving(wrongMAC), send: callsOrQuestions},
	{Name: "peer-down", behind: true, Number: "27", Says: "The far end of the router's link is down.", whole: true,
		Causes: []string{"link-down"}, Seen: []Outcome{Unreachable, Timeout, Silent, NoNetwork}, window: askedInVain, induce: serving(peerDown), send: callsOrQuestions},
	{Name: "duplicate-address", behind: true, Number: "36", Says: "The server has the client's address, too.", families: onlyFour,
		Causes: []string{"duplicate-address"}, Seen: []Outcome{Timeout, Silent}, induce: serving(twice), send: callsOrQuestions},
}
