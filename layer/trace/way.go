package trace

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer/trace/cause"
)

// mostSteps is how far a packet's way is followed.
const mostSteps = 16

// longestWays is how long ways are looked for: each step enters a network namespace.
const longestWays = 10 * time.Second

// Ways fills in the ways that the packets of verdicts have to where they died, from one
// namespace to the next, by the routes that the kernel has for them now, and what each
// namespace's connection tracking makes of their addresses. A way that does not lead to
// where the packet died is left out: so is one on which addresses are changed by what
// keeps no entry, or none any more. It takes no longer than ten seconds; what is then left is said in
// the evidence.
func (r *Reader) Ways(ctx context.Context, e *cause.Evidence, verdicts []cause.Verdict) {
	ctx, cancel := context.WithTimeout(ctx, longestWays)
	defer cancel()
	for i := range verdicts {
		if ctx.Err() != nil {
			e.Missing = append(e.Missing, fmt.Sprintf("the ways of the packets of %d of %d verdicts: finding the others took %s", len(verdicts)-i, len(verdicts), longestWays))
			return
		}
		v := &verdicts[i]
		if v.Tuple == nil {
			continue
		}
		way := r.way(ctx, e, v.Tuple, v.Where.Namespace)
		if len(way) > 1 && way[len(way)-1].Namespace == v.Where.Namespace {
			v.Way = way
		}
	}
}

// way follows a packet from the namespace that has its source address to the one called
// last.
func (r *Reader) way(ctx context.Context, e *cause.Evidence, packet *cause.Ends, last string) (way []cause.Step) {
	now := nft.Direction{From: packet.Source, To: packet.Destination}
	in, s := "", holder(e.Spaces, now.From.Addr())
	for s != nil && len(way) < mostSteps && ctx.Err() == nil {
		step := cause.Step{Namespace: s.Name, Pod: s.Pod, In: in}
		var p cause.Path
		_ = r.inside(s.Inode, func() {
			before, after := translated(packet.Protocol, now)
			step.Translation = changed(before, after)
			p = answer(s, question{s.Inode, in, before.From.Addr(), after.To.Addr()})
			now = after
		})
		step.Out, step.Route = p.Device, p.Route
		way = append(way, step)
		if s.Name == last || p.Device == "" || p.Type == "local" {
			return way
		}
		hop := now.To.Addr()
		if p.Gateway.IsValid() {
			hop = p.Gateway
		}
		in, s = across(e.Spaces, s, p.Device, hop)
	}
	return way
}

// withPorts are the protocols whose entries are known by ports.
var withPorts = map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}

// translated is what a packet is before and after the calling thread's namespace, by its
// entry there. A packet as it is known may be either: it died somewhere behind.
func translated(protocol string, d nft.Direction) (before, after nft.Direction) {
	number, known := withPorts[protocol]
	if !known || d.From.Port() == 0 || d.To.Port() == 0 {
		return d, d
	}
	if entry, err := nft.In("").Entry(number, d); err == nil {
		return d, entry.Translated(d)
	}
	opposite := nft.Direction{From: d.To, To: d.From}
	if entry, err := nft.In("").Entry(number, opposite); err == nil {
		was := entry.Translated(opposite)
		return nft.Direction{From: was.To, To: was.From}, d
	}
	return d, d
}

// changed says what is translated, "" if nothing is.
func changed(before, after nft.Direction) string {
	var parts []string
	if before.To != after.To {
		parts = append(parts, fmt.Sprintf("destination %v becomes %v", before.To, after.To))
	}
	if before.From != after.From {
		parts = append(parts, fmt.Sprintf("source %v becomes %v", before.From, after.From))
	}
	return strings.Join(parts, ", ")
}

// across is where a packet comes to that leaves by a device for the next hop: by the
// other end of a veth pair where that is known, else to the namespace that has the hop's
// address.
func across(spaces []*cause.Space, from *cause.Space, device string, hop netip.Addr) (in string, to *cause.Space) {
	for _, l := range from.After.Links {
		if l.Name != device || l.Kind != "veth" || l.PeerSpace == 0 {
			continue
		}
		at := slices.IndexFunc(spaces, func(s *cause.Space) bool { return s.Inode == l.PeerSpace })
		if at < 0 {
			return "", nil
		}
		for _, far := range spaces[at].After.Links {
			if far.Index == l.Peer && far.Master == 0 {
				return far.Name, spaces[at]
			}
		}
	}
	// over a bridge, a tunnel or a wire
	to = holder(spaces, hop)
	if to == nil || to == from {
		return "", nil
	}
	for _, a := range to.Addrs {
		for _, l := range to.After.Links {
			if a.Prefix.Addr() == hop && a.Index == l.Index {
				return l.Name, to
			}
		}
	}
	return "", to
}

// holder is the namespace that has an address; nil if none or several have it.
func holder(spaces []*cause.Space, addr netip.Addr) (found *cause.Space) {
	for _, s := range spaces {
		if slices.ContainsFunc(s.Addrs, func(a cause.Addr) bool { return a.Prefix.Addr() == addr }) {
			if found != nil {
				return nil
			}
			found = s
		}
	}
	return found
}
