package trace

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/millrace/millrace/layer/trace/cause"
)

// mostSteps is how far a packet's way is followed.
const mostSteps = 16

// longestWays is how long ways are looked for: each step enters a network namespace.
const longestWays = 10 * time.Second

// Ways fills in the ways that the packets of verdicts have to where they died, from one
// namespace to the next, by the routes that the kernel has for them now. What
// changes an address on the way is not followed: a way that does not lead to where the
// packet died is left out. It takes no longer than ten seconds; what is then left is said in
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
		way := r.way(ctx, e, v.Tuple.Source.Addr(), v.Tuple.Destination.Addr(), v.Where.Namespace)
		if len(way) > 1 && way[len(way)-1].Namespace == v.Where.Namespace {
			v.Way = way
		}
	}
}

// way follows a packet from the namespace that has its source address to the one called
// last.
func (r *Reader) way(ctx context.Context, e *cause.Evidence, src, dst netip.Addr, last string) (way []cause.Step) {
	in, s := "", holder(e.Spaces, src)
	for s != nil && len(way) < mostSteps {
		var p cause.Path
		_ = r.inside(s.Inode, func() { p = answer(s, question{s.Inode, in, src, dst}) })
		way = append(way, cause.Step{Namespace: s.Name, Pod: s.Pod, In: in, Out: p.Device, Route: p.Route})
		if s.Name == last || p.Device == "" || p.Type == "local" {
			return way
		}
		hop := dst
		if p.Gateway.IsValid() {
			hop = p.Gateway
		}
		in, s = across(e.Spaces, s, p.Device, hop)
	}
	return way
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
