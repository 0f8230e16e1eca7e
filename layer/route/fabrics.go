package route

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/probe"
)

const (
	// fabricsEvery is how often an adjacent node is asked of which nothing is known yet, or that
	// its fabric drops something; fabricsSoon how often at most.
	fabricsEvery = time.Minute
	fabricsSoon  = time.Second
	// Of the others nobody is asked, or hears, but for fabricsWindow at a time, at the same times
	// of the clock on all nodes: who listens pays for each packet that reaches the stack.
	fabricsWindow      = 10 * time.Second
	fabricsWindowEvery = 10 * time.Minute
	// youngFor is how long a node that has never answered is listened for.
	youngFor = time.Hour
	// fabricsAtOnce are asked at a time, fabricsApart after one another.
	fabricsAtOnce = 16
	fabricsApart  = 5 * time.Millisecond
	// fabricsTry is how long a round waits for answers before it sends again, and twice that at
	// its end. What comes late for an earlier one counts.
	fabricsTry = 200 * time.Millisecond
	// answersEach is how many notes a second are answered at each device and family: five times
	// what 12,000 nodes ask. Of others nobody hears.
	answersEach = 2000
)

// fabrics asks adjacent nodes whether packets of pods' addresses arrive, and answers them: a
// device that has a neighbour need not be a wire.
type fabrics struct {
	netns            string
	every, soon, try time.Duration
	windows          windows

	mu    sync.Mutex // guards what follows
	aims  map[netip.Prefix]adjacent
	known map[netip.Prefix]*fabric
	left  map[netip.Prefix]course // that of an earlier process, until it is aimed at
	begun bool
	// askers are who may ask, by where packets come from; own are this node's addresses.
	askers  map[netip.Addr]asker
	own     map[netip.Addr]owned
	waiting map[uint64]chan<- probe.Note
	posts   map[post]*probe.Notes
	refused map[post]string // why there is none

	news    chan struct{} // to the one that asks
	differs chan struct{} // to who applies
}

// asker is another node, by one address.
type asker struct {
	of   netip.Prefix // by which its ranges of the family are known
	pods bool
}

// owned is an address of this node: its own, or the first one of a range of its pods. first is
// that by which its ranges of the family are known.
type owned struct {
	pods  bool
	first netip.Addr
}

// post is where notes go and come.
type post struct {
	device int
	six    bool
}

func newFabrics(netns string) *fabrics {
	return &fabrics{netns: netns, every: fabricsEvery, soon: fabricsSoon, try: fabricsTry, windows: windows{fabricsWindow, fabricsWindowEvery}, known: map[netip.Prefix]*fabric{}, waiting: map[uint64]chan<- probe.Note{},
		posts: map[post]*probe.Notes{}, refused: map[post]string{}, news: make(chan struct{}, 1), differs: make(chan struct{}, 1)}
}

// ping has somebody look who has not yet looked since the last time.
func ping(who chan<- struct{}) {
	select {
	case who <- struct{}{}:
	default:
	}
}

// takeOver believes the routes of an earlier process until they are asked about, so that a
// restart changes nothing.
func (f *fabrics) takeOver(picture *Picture) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.begun {
		f.begun, f.left = true, leftBy(picture)
	}
}

// all is what plans have to know.
func (f *fabrics) all() map[netip.Prefix]course {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := map[netip.Prefix]course{}
	for to, left := range f.left {
		all[to] = left
	}
	for to, known := range f.known {
		all[to] = course{over: known.over, kept: known.kept}
	}
	return all
}

// aim says which nodes are adjacent, and what there is in the kernel.
func (f *fabrics) aim(aim *Picture, w *wish, have *Picture) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aims, f.askers, f.own = aim.adjacent, map[netip.Addr]asker{}, map[netip.Addr]owned{}
	for _, to := range w.own.ranges {
		first := w.own.first(to).Masked().Addr()
		f.own[to.Masked().Addr()] = owned{true, first}
		for _, a := range w.own.addresses {
			if a.BitLen() == first.BitLen() {
				f.own[a] = owned{first: first}
			}
		}
	}
	known := map[netip.Prefix]*fabric{}
	for _, n := range w.peers {
		ready := takesFrom(have, w.own, n)
		for _, to := range n.ranges {
			key := n.first(to)
			f.askers[to.Masked().Addr()] = asker{key, true}
			for _, a := range n.besides(w.own) {
				if a.BitLen() == to.Addr().BitLen() {
					f.askers[a] = asker{of: key}
				}
			}
			if _, is := f.aims[key]; is && key == to {
				known[key] = f.begin(key, ready, have)
			}
			delete(f.left, to)
		}
	}
	f.known = known
	ping(f.news)
}

// begin is what is known of a fabric, or was left; the lock is held.
func (f *fabrics) begin(to netip.Prefix, ready bool, have *Picture) *fabric {
	known := f.known[to]
	if known == nil {
		known = &fabric{begun: time.Now()}
		if left, was := f.left[to]; was {
			known.drops, known.over, known.kept = true, left.over, left.kept
		}
	}
	before := known.says()
	row := have.rows[to]
	known.ready, known.sends = ready, row != nil && !row.Direct
	if known.says() != before {
		known.hurry(known.last) // the other is to hear of it
	}
	return known
}

// takesFrom says whether there is all that it takes to get VXLAN from a node.
func takesFrom(have *Picture, own, n peer) bool {
	d := have.device
	if d == nil || d.torn || !sameSet(d.VTEPs, own.addresses) {
		return false
	}
	return !slices.ContainsFunc(n.besides(own), func(a netip.Addr) bool { return !have.vteps[a] })
}

// watch asks and answers until ctx ends, and calls changed when plans have to know of it.
func (f *fabrics) watch(ctx context.Context, changed func()) {
	var running sync.WaitGroup
	defer running.Wait()
	defer f.keepPosts(ctx, &running, nil)
	running.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-f.differs:
				changed()
			}
		}
	})
	free := make(chan struct{}, fabricsAtOnce)
	for ctx.Err() == nil {
		now := time.Now()
		f.keepPosts(ctx, &running, f.wanted(now))
		to, wait := f.due(now)
		if wait > 0 {
			wait = min(wait, f.windows.edge(now))
			select {
			case <-ctx.Done():
			case <-f.news:
			case <-time.After(wait):
			}
			continue
		}
		free <- struct{}{} // each ends soon
		running.Go(func() {
			defer func() { <-free }()
			f.ask(ctx, to)
		})
		pause(ctx, fabricsApart)
	}
}

// due is who is to be asked now, who has waited longest first; else how long that will be.
func (f *fabrics) due(now time.Time) (to netip.Prefix, wait time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var at time.Time
	found := false
	for one, known := range f.known {
		if !known.asking && (!found || known.next.Before(at)) {
			to, at, found = one, known.next, true
		}
	}
	if !found {
		return to, f.every
	}
	if wait = at.Sub(now); wait <= 0 {
		f.known[to].asking = true
	}
	return to, wait
}

// wanted are the posts at which neighbours are asked, and heard, at a time.
func (f *fabrics) wanted(now time.Time) map[post]bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	wanted := map[post]bool{}
	open := f.windows.open(now)
	for to, a := range f.aims {
		if known := f.known[to]; open || known != nil && known.listens(now) {
			wanted[post{a.index, a.via.Is6()}] = true
		}
	}
	return wanted
}

// keepPosts opens what is wanted, and closes the rest.
func (f *fabrics) keepPosts(ctx context.Context, running *sync.WaitGroup, wanted map[post]bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at, notes := range f.posts {
		if !wanted[at] {
			notes.Close()
			delete(f.posts, at)
		}
	}
	for at := range f.refused {
		if !wanted[at] {
			delete(f.refused, at)
		}
	}
	for at := range wanted {
		if f.posts[at] != nil {
			continue
		}
		notes, err := probe.OpenNotes(f.netns, at.device, at.six)
		if err != nil {
			f.refused[at] = err.Error()
			continue
		}
		delete(f.refused, at)
		f.posts[at] = notes
		running.Go(func() { f.listen(at, notes) })
	}
}

// listen takes what comes to a post until it ends, or its device does.
func (f *fabrics) listen(at post, notes *probe.Notes) {
	budget := allowance{most: answersEach}
	for {
		note, err := notes.Receive()
		if err != nil {
			f.mu.Lock()
			if f.posts[at] == notes { // nobody has closed it
				notes.Close()
				delete(f.posts, at)
			}
			f.mu.Unlock()
			return
		}
		if note.Answer {
			f.answered(note)
		} else if answer, may := f.answer(note); may && budget.take(time.Now()) {
			_ = notes.Send(answer) // who asked will ask again
		}
	}
}

// answered hands an answer to the round that waits for it: only who saw the request knows its
// token.
func (f *fabrics) answered(note probe.Note) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if to := f.waiting[note.Token]; to != nil {
		delete(f.waiting, note.Token)
		select {
		case to <- note:
		default: // it has all that it can take
		}
	}
}

// answer is what a request gets: nothing that is not from a node of the cluster to this one, by
// their own addresses or by those of their ranges, or is about other ranges than are known here.
func (f *fabrics) answer(note probe.Note) (answer probe.Note, may bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	who, known := f.askers[note.From]
	own, is := f.own[note.To]
	if !known || !is || who.pods != own.pods || note.About != about(who.of.Masked().Addr(), own.first) {
		return answer, false
	}
	answer = probe.Note{From: note.To, To: note.From, MAC: note.MAC, Answer: true, Token: note.Token, About: note.About}
	if is := f.known[who.of]; is != nil {
		answer.Said = uint8(is.says())
		// What a request says anybody can have written: it is a reason to ask, and no more.
		if !own.pods && sign(note.Said) != is.theirs && !is.hinted {
			is.hinted = true
			is.hurry(is.last.Add(f.soon))
			ping(f.news)
		}
	}
	return answer, true
}

// ask asks a node once, and takes in what came back.
func (f *fabrics) ask(ctx context.Context, to netip.Prefix) {
	f.mu.Lock()
	aim, known := f.aims[to], f.known[to]
	if known == nil {
		f.mu.Unlock()
		return // it has gone meanwhile
	}
	at := post{aim.index, aim.via.Is6()}
	notes, refused, says := f.posts[at], f.refused[at], known.says()
	known.hinted = false
	f.mu.Unlock()
	var r round
	err := errors.New(refused)
	if notes != nil {
		r, err = f.round(ctx, notes, aim, says)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	was := course{known.over, known.kept}
	known.asking, known.unsent = false, refused
	if err == nil && ctx.Err() == nil {
		known.learn(r)
	}
	differs := was != course{known.over, known.kept}
	if differs {
		ping(f.differs)
	}
	changed := known.says() != says
	known.later(time.Now(), differs || changed, f.soon, f.every, f.windows)
	if known.hinted { // since this round began
		known.hurry(known.last.Add(f.soon))
	}
	if changed {
		known.hurry(known.last) // the other is to hear of it
	}
	ping(f.news)
}

// round sends requests of both kinds until both are answered, or enough were not.
func (f *fabrics) round(ctx context.Context, notes *probe.Notes, aim adjacent, says sign) (r round, err error) {
	found, err := link.Neighbour(ctx, f.netns, aim.index, aim.via)
	if err != nil || len(found) != 6 {
		return r, err
	}
	ofNodes := probe.Note{From: aim.own, To: aim.via, MAC: [6]byte(found), Said: uint8(says), About: about(aim.ownPods, aim.pods)}
	ofPods := ofNodes
	ofPods.From, ofPods.To = aim.ownPods, aim.pods
	came := make(chan probe.Note, 2*triesOfRound)
	var tokens []uint64
	defer func() { f.forget(tokens) }()
	for try := range triesOfRound {
		if try == silentTries && r.nodes == 0 && !r.pods {
			return r, nil
		}
		for _, note := range []probe.Note{ofPods, ofNodes} {
			note.Token = rand.Uint64()
			tokens = append(tokens, note.Token)
			f.expect(note.Token, came)
			if err := notes.Send(note); err != nil {
				return r, err
			}
		}
		wait := f.try
		if try == triesOfRound-1 {
			wait *= 2
		}
		for late := time.After(wait); late != nil; {
			select {
			case <-ctx.Done():
				return r, ctx.Err()
			case <-late:
				late = nil
			case note := <-came:
				r.take(note, aim)
			}
			if r.pods && r.nodes > 0 {
				return r, nil
			}
		}
	}
	return r, nil
}

// take counts an answer, which has to be from whom was asked.
func (r *round) take(note probe.Note, aim adjacent) {
	switch {
	case note.From == aim.via && note.To == aim.own:
		r.nodes++
		r.theirs = sign(note.Said)
	case note.From == aim.pods && note.To == aim.ownPods:
		r.pods = true
	}
}

func (f *fabrics) expect(token uint64, came chan<- probe.Note) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting[token] = came
}

func (f *fabrics) forget(tokens []uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, token := range tokens {
		delete(f.waiting, token)
	}
}

// allowance is how many a second there may be.
type allowance struct {
	most, left int
	since      time.Time
}

func (a *allowance) take(now time.Time) bool {
	if now.Sub(a.since) >= time.Second {
		a.since, a.left = now, a.most
	}
	a.left--
	return a.left >= 0
}
