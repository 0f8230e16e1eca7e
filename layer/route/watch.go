package route

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// routesApart is the least time from a change of a route to looking at routes: who sets
// them up (a network service that begins anew) changes several at once, and where there are
// very many nobody is to read them all the time.
const routesApart = time.Second

// watchRoutes calls changed after somebody's routes to nodes changed, until ctx ends: what
// leads to them may have been away for a moment, in which ways were looked for.
func (l *Layer) watchRoutes(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		err := l.watchRoutesOnce(ctx, changed)
		pause(ctx, routesApart)
		if err == nil && ctx.Err() == nil {
			changed() // messages were lost
		}
	}
}

// watchRoutesOnce watches until ctx ends or the kernel's messages do. It returns an error
// where it cannot begin: once a minute routes are read all the same.
func (l *Layer) watchRoutesOnce(ctx context.Context, changed func()) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	routes := make(chan netlink.RouteUpdate, 64)
	err := netns.In(l.settings.Netns, func() error {
		return netlink.RouteSubscribeWithOptions(routes, ctx.Done(), netlink.RouteSubscribeOptions{ErrorCallback: func(error) {}})
	})
	if err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	var due <-chan time.Time
	for {
		select {
		case <-due:
			due = nil
			changed()
		case one, open := <-routes: // it ends when its socket is closed, after ctx too
			if !open {
				return nil
			}
			if due == nil && l.concerns(one.Route) {
				due = time.After(routesApart)
			}
		}
	}
}

// concerns says whether a route is somebody else's, and may lead to another node.
func (l *Layer) concerns(r netlink.Route) bool {
	if r.Protocol == Protocol || r.Table != unix.RT_TABLE_MAIN {
		return false
	}
	to, ok := prefixOf(r.Dst)
	l.mu.Lock()
	defer l.mu.Unlock()
	return !ok || slices.ContainsFunc(l.nodes, func(node netip.Addr) bool { return to.Contains(node) })
}

func pause(ctx context.Context, long time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(long):
	}
}
