package fault

import (
	"context"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// spoiled sends packets whose checksum is wrong: protocol says which.
func spoiled(protocol int) func(context.Context, *Part) {
	return func(ctx context.Context, p *Part) {
		raw, ok := openRaw(p)
		if !ok {
			return
		}
		defer raw.close()
		wrong := uint16(1 + p.random.IntN(60000))
		for range 2 * p.attempts {
			from := netip.AddrPortFrom(p.from, uint16(30000+p.random.IntN(30000)))
			var packet []byte
			switch protocol {
			case unix.IPPROTO_TCP:
				packet = segment(from, p.local(p.port), synFlag, p.random.Uint32(), nil, wrong)
			case unix.IPPROTO_UDP:
				packet = datagram(from, p.local(p.port), make([]byte, 40), wrong)
			default:
				packet = datagram(from, p.local(p.port), make([]byte, 40), 0)
				packet[10] ^= 0x5a
			}
			p.wrong(raw.send(packet))
			if !rest(ctx, 50*time.Millisecond) {
				return
			}
		}
		p.saw(Silent)
	}
}

func blameServer(p *Part) error { p.blame(p.server); return nil }

// blameGate: whoever gets an IP header first checks it.
func blameGate(p *Part) error { p.blame(p.gate()); return nil }

// beforeInvalid has a rule in front of the server that drops what connection tracking
// cannot make sense of, which is what a wrong checksum looks like.
func beforeInvalid(p *Part) error {
	p.blame(p.router)
	return p.dropInvalid()
}

var checksumFaults = []*Fault{
	{Name: "bad-tcp-checksum", Number: "10a", Says: "TCP segments come with a wrong checksum.",
		Causes: []string{"bad-checksum"}, Seen: []Outcome{Silent}, induce: serving(blameServer), send: spoiled(unix.IPPROTO_TCP)},
	{Name: "bad-udp-checksum", Number: "10b", Says: "Datagrams come with a wrong checksum.",
		Causes: []string{"bad-checksum"}, Seen: []Outcome{Silent}, induce: serving(blameServer), send: spoiled(unix.IPPROTO_UDP)},
	{Name: "bad-ip-checksum", Number: "10c", Says: "IP headers come with a wrong checksum.", families: onlyFour,
		Causes: []string{"bad-checksum"}, Seen: []Outcome{Silent}, induce: serving(blameGate), send: spoiled(0)},
	{Name: "bad-checksum-invalid", Number: "10d", Says: "A wrong checksum, dropped by a rule about invalid packets.",
		Causes: []string{"bad-checksum"}, Seen: []Outcome{Silent}, needs: []string{"nft"},
		induce: serving(beforeInvalid), send: spoiled(unix.IPPROTO_TCP)},
}
