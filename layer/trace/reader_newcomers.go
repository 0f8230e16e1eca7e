package trace

import (
	"context"
	"time"

	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/layer/trace/cause"
)

// Bounds of what is done for namespaces that come while it is watched. Pods that come are
// few; those that crash again and again keep theirs.
const (
	// mostNewcomers is how many are read as soon as something happens in them.
	mostNewcomers = 200
	// mostMet is how many kinds of events, each in its namespace, Options.Met is told of.
	mostMet = 16384
	// lookPause is the least time between two searches; a search takes no more than a
	// tenth of one processor.
	lookPause = 100 * time.Millisecond
)

// identity tells a network namespace from every other one: its inode, which another gets
// when it has gone, and the lower half of its cookie, 0 where it is not known.
type identity struct{ inode, cookie uint32 }

// Newcomers finds the namespaces in which something happens and that were not there when
// the Reader read before the window, and reads them while they are there.
type Newcomers struct {
	reader *Reader
	find   func() ([]Namespace, error)
	met    chan identity
	done   chan struct{}
	stop   context.CancelFunc
}

// Newcomers prepares to find namespaces; find lists those that there are now.
func (r *Reader) Newcomers(find func() ([]Namespace, error)) *Newcomers {
	r.find = find
	return &Newcomers{reader: r, find: find, met: make(chan identity, mostMet), done: make(chan struct{})}
}

// Met is for Options.Met.
func (n *Newcomers) Met(space, cookie uint32) {
	select {
	case n.met <- identity{space, cookie}:
	default: // After finds it, if it is there then
	}
}

// Follow begins to look, once the Reader has read before the window; Stop ends that, and
// has to be called before After.
func (n *Newcomers) Follow(ctx context.Context) {
	ctx, n.stop = context.WithCancel(ctx)
	go func() {
		defer close(n.done)
		for len(n.reader.came) < mostNewcomers {
			wanted := n.wait(ctx)
			if wanted == nil {
				return
			}
			begun := time.Now()
			// Also when the window ends meanwhile: they may have gone by then.
			n.reader.meet(context.WithoutCancel(ctx), wanted)
			select {
			case <-ctx.Done():
			case <-time.After(max(lookPause, 10*time.Since(begun))):
			}
		}
	}()
}

// Stop ends Follow, when those that it was told of are read.
func (n *Newcomers) Stop() {
	n.stop()
	<-n.done
}

// wait is for something to happen in namespaces that are not known; nil at the end.
func (n *Newcomers) wait(ctx context.Context) map[identity]bool {
	wanted := map[identity]bool{}
	for {
		var id identity
		select {
		case id = <-n.met:
		default:
			if len(wanted) > 0 {
				return wanted
			}
			select {
			case <-ctx.Done():
				return nil
			case id = <-n.met:
			}
		}
		if !n.reader.knows(id) {
			wanted[id] = true
		}
	}
}

// knows says whether a namespace is one of those that were listed before the window. One
// that was not read then is known as long as it is there.
func (r *Reader) knows(id identity) bool {
	at, listed := r.at[id.inode]
	if own := r.cookies[id.inode]; own != 0 && id.cookie != 0 {
		return listed && own == id.cookie
	}
	return listed && r.spaces[at].There()
}

// meet looks for namespaces and reads those that it finds.
func (r *Reader) meet(ctx context.Context, wanted map[identity]bool) {
	places, err := r.find()
	r.miss("network namespaces that came meanwhile", err)
	for _, place := range places {
		if len(r.came) >= mostNewcomers {
			return
		}
		id := identity{inode: place.Inode}
		_ = netns.In(place.Path, func() error {
			if cookie, err := netns.Cookie(""); err == nil {
				id.cookie = uint32(cookie)
			}
			if wanted[id] && here(place.Inode) {
				now := r.readSpace(ctx, place, meet(nil))
				if r.came[id] == nil {
					r.came[id] = &newcomer{Namespace: place, first: now}
				}
				r.came[id].last = now
			}
			return nil
		})
	}
}

// newcomer is a namespace as it was when something happened in it for the first time, and
// when something new happened for the last time: the first packets of a pod die while its
// network is made.
type newcomer struct {
	Namespace
	first, last *ending
}

// adopt takes up the namespaces that came meanwhile: those that are there still are read
// as all others, with what was read first as their beginning; those that have gone again
// are as they were read. Events of others are given numbers of their own, so that nobody
// with the same inode gets them.
func (r *Reader) adopt(ctx context.Context, events []cause.Event) (gone []*cause.Space) {
	wanted := map[identity]bool{}
	for i := range events {
		if id := identityOf(&events[i]); id.inode != 0 && !r.knows(id) && r.came[id] == nil {
			wanted[id] = true
		}
	}
	if r.find == nil {
		wanted = nil
	}
	var there []Namespace
	if len(wanted) > 0 || len(r.came) > 0 {
		var err error
		there, err = r.find()
		r.miss("network namespaces that came meanwhile", err)
	}
	living := map[identity]bool{}
	for _, place := range there {
		id := identity{inode: place.Inode}
		if cookie, err := netns.Cookie(place.Path); err == nil {
			id.cookie = uint32(cookie)
		}
		if met := r.came[id]; met != nil || wanted[id] {
			living[id] = true
			r.take(place, id.cookie, met)
		}
	}
	next := uint32(1) // inodes are larger
	others := map[identity]uint32{}
	for id, met := range r.came {
		if living[id] {
			continue
		}
		s := met.last.Space
		s.Before, s.Name = met.first.After, s.Name+" (gone)"
		others[id], s.Inode = next, next
		gone = append(gone, s)
		next++
	}
	for i := range events {
		e := &events[i]
		id := identityOf(e)
		if id.inode == 0 || living[id] || r.knows(id) {
			continue
		}
		if others[id] == 0 {
			others[id] = next
			next++
		}
		e.Space = others[id]
	}
	return gone
}

// take makes a namespace one of those that are read, in the place of one that had its
// inode.
func (r *Reader) take(n Namespace, cookie uint32, met *newcomer) {
	at, listed := r.at[n.Inode]
	if !listed {
		at = len(r.spaces)
		r.at[n.Inode], r.spaces = at, append(r.spaces, Namespace{})
	}
	r.spaces[at], r.cookies[n.Inode] = n, cookie
	delete(r.before, n.Inode)
	if met != nil {
		r.before[n.Inode] = &beginning{Reading: met.first.After, cookie: met.first.cookie, rules: countsOf(met.first.Rules), drops: met.first.drops}
	}
}

func identityOf(e *cause.Event) identity { return identity{e.Space, e.Cookie} }

// Namespaces are those that are read, with those that came meanwhile.
func (r *Reader) Namespaces() []Namespace { return r.spaces }
