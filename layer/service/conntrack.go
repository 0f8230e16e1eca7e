package service

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/millrace/millrace/kernel/need"
	"github.com/millrace/millrace/kernel/nft"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/model"
)

// Conntrack says whether the kernel tracks connections between pods
// (nf_conntrack) where somebody's rules make it track. Service traffic does not
// need it on either path: packets carry the addresses of pods wherever the host's
// stack sees them. It only fills a table, and fails when that is full.
type Conntrack string

// The three settings.
const (
	// ConntrackAuto bypasses tracking where some rule asks for it and none needs
	// it for packets between pods.
	ConntrackAuto Conntrack = "auto"
	// ConntrackBypass bypasses it whatever rules there are.
	ConntrackBypass Conntrack = "bypass"
	// ConntrackKeep leaves it as it is.
	ConntrackKeep Conntrack = "keep"
)

// ParseConntrack reads a setting; the empty text is ConntrackAuto.
func ParseConntrack(text string) (Conntrack, error) {
	switch c := Conntrack(text); c {
	case "":
		return ConntrackAuto, nil
	case ConntrackAuto, ConntrackBypass, ConntrackKeep:
		return c, nil
	}
	return "", fmt.Errorf("unknown setting %q: use %s, %s or %s", text, ConntrackAuto, ConntrackBypass, ConntrackKeep)
}

// bypass are ranges of pods between which connections are not tracked: the
// Subject of a change of the nftables table.
type bypass []netip.Prefix

// Object implements layer.Subject.
func (b bypass) Object() string { return "conntrack bypass" }

// Detail implements layer.Subject.
func (b bypass) Detail() string {
	const shown = 8
	names := make([]string, 0, shown+1)
	for i, p := range b {
		if i == shown {
			names = append(names, fmt.Sprintf("and %d more", len(b)-shown))
			break
		}
		names = append(names, p.String())
	}
	if len(names) == 0 {
		return ""
	}
	return "for " + strings.Join(names, ", ")
}

// untracked is what a plan says of tracking.
type untracked struct {
	setting Conntrack
	// ranges are those of the cluster's pods.
	ranges bypass
}

func untrackedOf(settings Settings, snapshot *model.Snapshot) untracked {
	all := slices.Clone(settings.ClusterCIDRs)
	if all == nil {
		for _, node := range snapshot.Nodes {
			all = append(all, node.PodCIDRs...)
		}
	}
	return untracked{settings.Conntrack, nft.Merge(all)}
}

// tracking is what there is of tracking in the node's namespace.
type tracking struct {
	// rules is what the rules of others want of it.
	rules nft.Tracking
	// inForce are the ranges of our table; with torn, somebody changed it.
	inForce bypass
	torn    bool
	// err is why this is not known, or why there can be no table.
	err error
}

// decide says which ranges are to be bypassed. Where there are none although it
// would be good, why is a sentence for the operator.
func (t tracking) decide(want untracked) (ranges bypass, why string) {
	const tracked = "connections between pods take room in the node's conntrack table: "
	idle := want.setting != ConntrackBypass && !t.rules.Asked // nobody makes the kernel track anything
	switch {
	case want.setting == ConntrackKeep, idle && (t.err == nil || t.lacksNFTables()):
		return nil, ""
	case t.err != nil:
		return nil, "connections between pods cannot be left out of the node's conntrack table: " + t.err.Error()
	case len(want.ranges) == 0:
		return nil, tracked + "no node says which addresses its pods have (spec.podCIDRs)"
	case want.setting == ConntrackBypass:
		return want.ranges, ""
	}
	for _, use := range t.rules.Uses {
		if use.Touches(want.ranges) {
			return nil, tracked + whoNeeds(use) + "; --conntrack bypass leaves them out all the same"
		}
	}
	return want.ranges, ""
}

func (t tracking) lacksNFTables() bool {
	var absent *need.Feature
	return errors.As(t.err, &absent)
}

// whoNeeds says whose rule needs tracking.
func whoNeeds(use nft.Use) string {
	if use.Table == "kube-proxy" || strings.HasPrefix(use.Chain, "KUBE-") {
		return fmt.Sprintf("kube-proxy's rules are present and need it (%s)", use)
	}
	return fmt.Sprintf("somebody's rules need it (%s)", use)
}

// diffBypass says what leads to the ranges that are to be bypassed: what comes
// first, and what goes last. Without prune no range goes for want of a node that
// names it.
func diffBypass(have tracking, want untracked, prune bool) (first, last layer.Changes) {
	if have.err != nil {
		return nil, nil
	}
	if !prune {
		want.ranges = nft.Merge(slices.Concat(want.ranges, have.inForce))
	}
	ranges, _ := have.decide(want)
	there := len(have.inForce) > 0 || have.torn
	switch {
	case len(ranges) == 0 && there:
		last = layer.Changes{{Op: layer.Remove, Subject: have.inForce}}
	case len(ranges) > 0 && !there:
		first = layer.Changes{{Op: layer.Add, Subject: ranges}}
	case have.torn, !slices.Equal(ranges, have.inForce):
		first = layer.Changes{{Op: layer.Alter, Subject: ranges}}
	}
	return first, last
}

// readTracking reads what the rules of others want and what our table holds. An
// error is part of what was found: nothing is changed then.
func readTracking(rules *nft.Net) (t tracking) {
	var whole bool
	t.inForce, whole, t.err = untrackedNow(rules)
	t.torn = !whole
	wanted, err := rules.Tracking()
	t.rules = wanted
	if t.err == nil {
		t.err = err
	}
	return t
}

// untrackedNow is our table; where there are no nftables it is not there.
func untrackedNow(rules *nft.Net) (bypass, bool, error) {
	ranges, whole, err := rules.Untracked()
	return ranges, whole || err != nil, err
}

// readTracking implements room.
func (d *datapath) readTracking() tracking {
	t := readTracking(d.rules)
	if t.err == nil {
		t.err = d.untrackable
	}
	return t
}

// setUntracked writes our table, or removes it, and reads it back. What tracking
// remembers of connections that are bypassed now goes.
func (d *datapath) setUntracked(ranges bypass) error {
	err := d.rules.SetUntracked(ranges)
	var absent *need.Feature
	if errors.As(err, &absent) {
		d.untrackable = err // said once; from then on it is a degradation
	}
	if err != nil {
		return err
	}
	d.bypassing = len(ranges) > 0
	found, whole, err := d.rules.Untracked()
	if err != nil {
		return err
	}
	if !whole || !slices.Equal(bypass(found), ranges) {
		return fmt.Errorf("read back: the kernel holds %v", found)
	}
	if len(ranges) > 0 {
		_, err = d.rules.Forget(ranges)
	}
	return err
}

// bypassRemoval says what of our table there is to remove.
func (l *Layer) bypassRemoval() (layer.Changes, error) {
	rules := nft.In(l.settings.Netns)
	ranges, whole, err := rules.Untracked()
	var absent *need.Feature
	if errors.As(err, &absent) {
		return nil, nil
	}
	if err != nil || len(ranges) == 0 && whole {
		return nil, err
	}
	return layer.Changes{layer.Gone(goneBypass{ranges, rules})}, nil
}

// goneBypass is a bypass that is to be removed.
type goneBypass struct {
	bypass
	rules *nft.Net
}

// Remove implements layer.Removable.
func (g goneBypass) Remove() error { return g.rules.SetUntracked(nil) }

// endBypass removes the table where all is to end with this process.
func (d *datapath) endBypass() error {
	if d.settings.Pins != "" || !d.bypassing {
		return nil
	}
	return d.rules.SetUntracked(nil)
}

// conntrackNow is the setting, and what is in force by it.
func (l *Layer) conntrackNow() string {
	setting, _ := ParseConntrack(string(l.settings.Conntrack))
	if len(l.bypassed) == 0 {
		return string(setting)
	}
	return fmt.Sprintf("%s, bypassed %s", setting, l.bypassed.Detail())
}
