package resolver

import (
	"context"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/millrace/millrace/model"
)

const (
	// lessonEvery is how often the kernel is told what was learned, lessonMost how much at
	// once.
	lessonEvery = 20 * time.Millisecond
	lessonMost  = 256
	leadMost    = 4096
	// askEvery is how often the kernel is asked what pods have asked for; more seldom, up to
	// askSeldom, if that takes more than askShare of the time.
	askEvery  = time.Second
	askSeldom = 10 * time.Second
	askShare  = 100
	// readEvery is how often files that name servers are read again.
	readEvery = 5 * time.Second
	// lately is for how long a name that was asked for is kept in the kernel without being
	// asked for again, at least.
	lately = 30 * time.Second
)

// Sink is where names outside the cluster are answered without the Resolver: the kernel.
type Sink interface {
	// Learn says what is known of some names, each whole. What does not fit is left out.
	Learn([]model.Outside) error
	// Forget says that nothing is known of some any more.
	Forget(names []string) error
	// Asked are the names that are there.
	Asked() ([]model.Asked, error)
	// Learned is what is known of those names, or was until its time was over.
	Learned() ([]model.Outside, error)
}

// Run tells the sink what is learned, keeps fresh what pods ask for, and reads again the
// files that name servers, until ctx ends.
func (r *Resolver) Run(ctx context.Context) {
	r.recall()
	every := askEvery
	look, files := time.NewTimer(every), time.NewTicker(readEvery)
	defer look.Stop()
	defer files.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-files.C:
			r.mu.Lock()
			r.arrange()
			r.mu.Unlock()
		case name := <-r.lead:
			r.teach(ctx, name)
		case <-look.C:
			begun := time.Now()
			if r.settings.Sink != nil {
				r.freshen(r.now(), every)
			}
			every = min(max(askEvery, askShare*time.Since(begun)), askSeldom)
			look.Reset(every)
		}
	}
}

// lesson notes that there is something to learn.
func (r *Resolver) lesson(k key) {
	if _, address := k.other(); r.settings.Sink == nil || !address {
		return
	}
	select {
	case r.lead <- k.name:
	default: // the kernel learns it when it is asked for next
	}
}

// teach tells the kernel of a name, and of those that come within a moment.
func (r *Resolver) teach(ctx context.Context, name string) {
	names := map[string]bool{name: true}
	moment := time.After(lessonEvery)
	for waiting := true; waiting && len(names) < lessonMost; {
		select {
		case more := <-r.lead:
			names[more] = true
		case <-moment:
			waiting = false
		case <-ctx.Done():
			return
		}
	}
	var all []model.Outside
	c, now := r.settled(), r.now()
	for name := range names {
		if of, ok := r.known(name, now); ok {
			all = append(all, of)
		}
	}
	r.learn(c, all)
}

// learn tells the kernel what was known with a configuration. If that is another one by now,
// what it had forgotten may be back, and is taken from it again.
func (r *Resolver) learn(by *config, all []model.Outside) {
	if len(all) == 0 {
		return
	}
	if err := r.settings.Sink.Learn(all); err != nil && r.spoken.may(r.now()) {
		r.log.Warn("tell the kernel of names outside the cluster: the agent answers for them meanwhile", "names", len(all), "error", err)
	}
	if now := r.config.Load(); now != by {
		var names []string
		for _, of := range all {
			if others(by, now)(dns.Fqdn(of.Name)) {
				names = append(names, of.Name)
			}
		}
		r.unlearn(names, nil)
	}
}

// forget takes names from the kernel.
func (r *Resolver) forget(which func(name string) bool) {
	if r.settings.Sink == nil {
		return
	}
	asked, err := r.settings.Sink.Asked()
	var names []string
	for _, a := range asked {
		if which(dns.Fqdn(a.Name)) {
			names = append(names, a.Name)
		}
	}
	r.unlearn(names, err)
}

// unlearn takes names from the kernel, unless they could not be read.
func (r *Resolver) unlearn(names []string, err error) {
	if err == nil && len(names) > 0 {
		err = r.settings.Sink.Forget(names)
	}
	if err != nil {
		r.log.Warn("take names outside the cluster from the kernel, whose servers are others now: they end with their TTL", "error", err)
	}
}

// freshen asks anew for what pods have asked for since it was learned and is about to end.
// Where no server answers, the kernel is given what was known last. It looks again after
// every.
func (r *Resolver) freshen(now time.Time, every time.Duration) {
	asked, err := r.settings.Sink.Asked()
	if err != nil {
		if r.spoken.may(now) {
			r.log.Warn("read which names outside the cluster are asked for: they are not kept fresh", "error", err)
		}
		return
	}
	c := r.settled()
	if c == nil {
		return
	}
	var stale []model.Outside
	for _, a := range asked {
		name := dns.Fqdn(a.Name)
		to := c.forward(name)
		if to == nil || len(to.servers) == 0 {
			continue
		}
		kinds := [2]key{{name, dns.TypeA}, {name, dns.TypeAAAA}}
		have := [2]found{r.cache.peek(kinds[0], now), r.cache.peek(kinds[1], now)}
		if !have[0].usable() || !have[1].usable() {
			continue
		}
		left := min(a.A.Sub(now), a.AAAA.Sub(now))
		ttl := min(have[0].ttl, have[1].ttl)
		old := !have[0].fresh() || !have[1].fresh()
		learned := now.Add(-min(have[0].age, have[1].age))
		switch {
		case a.Last.Sub(learned) < askEvery: // no pod has since: the kernel notes to a second when one does
			continue
		case ttl < soonFrom && !have[0].failing() && !have[1].failing():
			continue
		case !old && left > max(ttl/soonShare, 2*every), now.Sub(a.Last) > max(have[0].ttl, have[1].ttl, lately):
			continue
		}
		if have[0].resting(now) || have[1].resting(now) {
			if of, ok := r.known(name, now); ok && left < every {
				stale = append(stale, of)
			}
			continue
		}
		r.fetchEarly(c, to, kinds[0])
		r.fetchEarly(c, to, kinds[1])
	}
	r.learn(c, stale)
}

// recall takes up what an earlier process has taught the kernel: if no server answers now,
// it is all that is known. Whom that process asked is not, so it is stale here: given if no
// server answers, and asked for anew by the next query that the kernel leaves to the agent.
// What was stale a moment ago may be given at once.
func (r *Resolver) recall() {
	if r.settings.Sink == nil {
		return
	}
	all, err := r.settings.Sink.Learned()
	if err != nil {
		r.log.Warn("read what an earlier agent learned of names outside the cluster: their servers are asked anew", "error", err)
		return
	}
	now := r.now()
	var stale []model.Outside
	c := r.settled()
	for _, of := range all {
		name := dns.Fqdn(of.Name)
		if c != nil && others(nil, c)(name) {
			continue
		}
		r.mu.Lock()
		silent := r.recallFamily(key{name, dns.TypeA}, of.A, now)
		silent = r.recallFamily(key{name, dns.TypeAAAA}, of.AAAA, now) || silent
		r.mu.Unlock()
		if again, ok := r.known(name, now); ok && silent {
			stale = append(stale, again)
		}
	}
	r.learn(c, stale)
}

// recallFamily keeps what was known of one family; it says whether no server had answered
// a moment ago. r.mu is held.
func (r *Resolver) recallFamily(at key, k model.Known, now time.Time) (silent bool) {
	if have := r.cache.peek(at, now); have.usable() {
		return false
	}
	a, ok := recalled(k, at, now)
	if !ok {
		return false
	}
	packed, err := a.pack(at)
	if err != nil {
		return false
	}
	over := max(now.Sub(k.Until), staleMost-recalledMost)
	silent = k.Stale && now.Sub(k.Until) < staleTTL
	r.cache.put(at, nobody, a, packed, now.Add(-a.ttl-over))
	if silent {
		r.cache.fail(at, nobody, now)
	}
	return silent
}

// recalled is what knownOf made k of, with what is left of its time, a second at least.
func recalled(k model.Known, at key, now time.Time) (*answer, bool) {
	left := max(k.Until.Sub(now), 0).Round(time.Second)
	if k.Stale {
		left = 0
	}
	a := &answer{ttl: max(left, time.Second)}
	name := at.name
	add := func(kind uint16, ttl time.Duration, fill func(dns.RR_Header) dns.RR) {
		a.records = append(a.records, fill(dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: uint32(max(ttl, time.Second) / time.Second)}))
	}
	for _, alias := range k.Chain {
		target := dns.Fqdn(alias.Target)
		add(dns.TypeCNAME, alias.TTL, func(h dns.RR_Header) dns.RR { return &dns.CNAME{Hdr: h, Target: target} })
		name = target
	}
	switch k.State {
	case model.KnownAddresses:
		for _, addr := range k.Addresses {
			add(at.kind, left, func(h dns.RR_Header) dns.RR {
				if addr.Is4() {
					return &dns.A{Hdr: h, A: addr.AsSlice()}
				}
				return &dns.AAAA{Hdr: h, AAAA: addr.AsSlice()}
			})
		}
		return a, len(k.Addresses) > 0
	case model.KnownNoData, model.KnownAbsent:
		if k.State == model.KnownAbsent {
			a.rcode = dns.RcodeNameError
		}
		record, _, err := dns.UnpackRR(k.SOA, 0)
		if err == nil {
			a.soa, _ = record.(*dns.SOA)
		}
		return a, a.soa != nil
	}
	return nil, false
}

// known is what is known of a name, if both families are; what is stale only if no server
// has answered just now.
func (r *Resolver) known(name string, now time.Time) (of model.Outside, ok bool) {
	if strings.Contains(name, "\\") {
		return of, false
	}
	of.Name = strings.TrimSuffix(name, ".")
	for _, family := range []struct {
		kind uint16
		to   *model.Known
	}{{dns.TypeA, &of.A}, {dns.TypeAAAA, &of.AAAA}} {
		f := r.cache.peek(key{name, family.kind}, now)
		if !f.fresh() && !(f.usable() && f.resting(now)) {
			return of, false
		}
		if *family.to, ok = knownOf(f, now); !ok {
			return of, false
		}
	}
	// Resolvers that ask for both, as musl does, take a name for absent if one answer says so.
	return of, (of.A.State == model.KnownAbsent) == (of.AAAA.State == model.KnownAbsent)
}

// knownOf is one family. False for what cannot be told: a negative answer without its
// record is kept by nobody.
func knownOf(f found, now time.Time) (k model.Known, ok bool) {
	m, err := f.unpack()
	if err != nil {
		return k, false
	}
	k.Until = now.Add(f.left)
	if k.Stale = f.left <= 0; k.Stale {
		k.Until = now.Add(staleTTL)
	}
	for _, record := range m.Answer {
		switch record := record.(type) {
		case *dns.CNAME:
			if strings.Contains(record.Target, "\\") {
				return k, false
			}
			k.Chain = append(k.Chain, model.Alias{Target: strings.TrimSuffix(record.Target, "."), TTL: time.Duration(record.Hdr.Ttl) * time.Second})
		case *dns.A:
			if addr, ok := netip.AddrFromSlice(record.A.To4()); ok {
				k.Addresses = append(k.Addresses, addr)
			}
		case *dns.AAAA:
			if addr, ok := netip.AddrFromSlice(record.AAAA.To16()); ok {
				k.Addresses = append(k.Addresses, addr)
			}
		}
	}
	if len(k.Addresses) > 0 {
		k.State = model.KnownAddresses
		return k, true
	}
	k.State = model.KnownNoData
	if f.rcode == dns.RcodeNameError {
		k.State = model.KnownAbsent
	}
	if len(m.Ns) != 1 {
		return k, false
	}
	k.SOA = make([]byte, dns.Len(m.Ns[0]))
	n, err := dns.PackRR(m.Ns[0], k.SOA, 0, nil, false)
	if err != nil {
		return k, false
	}
	k.SOA = k.SOA[:n]
	return k, true
}
