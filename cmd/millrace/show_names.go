package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/dns"
	"github.com/millrace/millrace/model"
)

func showNames(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   "names [PART]",
		Short: "Names that are answered for in the kernel, and search lists of pods",
		Long: `
Reads the pinned maps, so that it works without an agent; the zone comes from the agent.
First the cluster's names, then those outside that were learned, 1,000 of them at most,
and for how long they are known. With PART only names that hold it. Then the search lists
of pods, by their devices at the node, as far as they are known. A note says of which
addresses the node's own queries go to the agent. Needs CAP_BPF or
CAP_SYS_ADMIN.`,
		Args: cobra.MaximumNArgs(1),
	}, readsOnly, func(ctx context.Context, args []string) error {
		var notes []string
		at.dns, notes = zoneOfAgent(ctx, &at)
		picture, err := at.names().Look()
		if err != nil {
			return err
		}
		part := strings.ToLower(strings.Join(args, ""))
		rows := []*dns.Row{}
		for _, row := range picture.(*dns.Picture).Rows() {
			if strings.Contains(row.FullName(), part) {
				rows = append(rows, row)
			}
		}
		outside, more, err := namesOutside(&at, part, time.Now())
		if err != nil {
			return err
		}
		if more > 0 {
			notes = append(notes, fmt.Sprintf("%d more names outside are not shown: ask for a PART of them", more))
		}
		node, err := at.nodeNames().Look()
		if err != nil {
			return err
		}
		return printNames(s, rows, outside, picture.(*dns.Picture).Searches(), node.Subjects(), notes)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}

// zoneOfAgent is the zone that the agent answers for, and what of it is left to others; only
// it knows.
func zoneOfAgent(ctx context.Context, at *place) (zone string, notes []string) {
	var status agent.Status
	if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
		fmt.Fprintln(os.Stderr, "no zone:", err)
	}
	for _, l := range status.Layers {
		if l.Name == at.names().Name() {
			return l.Settings["zone"], l.Degraded
		}
	}
	return "", nil
}

// mostOutside is how many names outside are shown; there may be 32,768.
const mostOutside = 1000

// nameOutside is a name that is not one of the cluster's, for people and as JSON.
type nameOutside struct {
	Name string       `json:"name"`
	A    *knownFamily `json:"a,omitempty"`
	AAAA *knownFamily `json:"aaaa,omitempty"`
}

// knownFamily is what is answered of one family; nil where others are asked.
type knownFamily struct {
	// Answer is "addresses", "no address" or "no such name".
	Answer    string       `json:"answer"`
	Aliases   []string     `json:"aliases,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
	Until     time.Time    `json:"until"`
	Stale     bool         `json:"stale,omitempty"`
}

// namesOutside are those that are known now and hold a part, and how many more there are.
func namesOutside(at *place, part string, now time.Time) (shown []nameOutside, more int, err error) {
	all, err := at.names().LookLearned()
	shown = []nameOutside{}
	for _, o := range all {
		a, aaaa := familyOf(o.A, now), familyOf(o.AAAA, now)
		switch {
		case !strings.Contains(o.Name, part) || a == nil && aaaa == nil:
		case len(shown) == mostOutside:
			more++
		default:
			shown = append(shown, nameOutside{o.Name, a, aaaa})
		}
	}
	return shown, more, err
}

func familyOf(k model.Known, now time.Time) *knownFamily {
	answer := map[model.KnownState]string{model.KnownAddresses: "addresses", model.KnownNoData: "no address", model.KnownAbsent: "no such name"}[k.State]
	if answer == "" || !k.Until.After(now) {
		return nil
	}
	f := &knownFamily{Answer: answer, Addresses: k.Addresses, Until: k.Until.Round(time.Second), Stale: k.Stale}
	for _, alias := range k.Chain {
		f.Aliases = append(f.Aliases, alias.Target)
	}
	return f
}

// text is what is answered, and for how long.
func (f *knownFamily) text(now time.Time) string {
	if f == nil {
		return "not known"
	}
	var words []string
	for _, addr := range f.Addresses {
		words = append(words, addr.String())
	}
	text := strings.Join(words, ", ")
	if text == "" {
		text = f.Answer
	}
	if len(f.Aliases) > 0 {
		text += ", by " + strings.Join(f.Aliases, ", ")
	}
	if f.Stale {
		text += ", stale"
	}
	return fmt.Sprintf("%s, for %v", text, f.Until.Sub(now).Round(time.Second))
}

func printNames(s *settings, rows []*dns.Row, outside []nameOutside, searches []*dns.SearchList, node []layer.Subject, notes []string) error {
	if s.json() {
		return printJSON(map[string]any{"names": rows, "outside": outside, "searches": append([]*dns.SearchList{}, searches...), "node": append([]layer.Subject{}, node...), "degraded": append([]string{}, notes...)})
	}
	for _, d := range node {
		notes = append(notes, d.Object()+" "+d.Detail())
	}
	for _, note := range notes {
		fmt.Fprintln(os.Stderr, "note:", note)
	}
	t := newTable(os.Stdout, "NAME", "ADDRESSES")
	for _, row := range rows {
		t.row(row.FullName(), row.Leads())
	}
	if err := t.print(); err != nil {
		return err
	}
	if len(outside) > 0 {
		now := time.Now()
		fmt.Println()
		t = newTable(os.Stdout, "NAME OUTSIDE", "A", "AAAA")
		for _, o := range outside {
			t.row(o.Name, o.A.text(now), o.AAAA.text(now))
		}
		if err := t.print(); err != nil {
			return err
		}
	}
	if len(searches) == 0 {
		return nil
	}
	fmt.Println()
	t = newTable(os.Stdout, "DEVICE", "NDOTS", "SEARCH LIST")
	for _, list := range searches {
		t.row(list.Device, fmt.Sprint(list.Ndots), strings.Join(list.Suffixes, " "))
	}
	return t.print()
}
