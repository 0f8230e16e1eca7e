package model

import "testing"

// Hints say the same however they are written, and name nobody else.
func TestHints(t *testing.T) {
	h := HintsFor([]string{"n2", "n1", "n2"}, []string{"zone-a"})
	if h != HintsFor([]string{"n1", "n2"}, []string{"zone-a"}) {
		t.Error("the same names in another order are other hints")
	}
	if h == HintsFor([]string{"zone-a"}, []string{"n1", "n2"}) || h == HintsFor([]string{"n1", "n2"}, nil) {
		t.Error("hints for others are the same")
	}
	if (HintsFor(nil, nil) != Hints{} || HintsFor([]string{}, []string{}) != Hints{}) {
		t.Error("no names are hints")
	}
	for name, want := range map[string]bool{"n1": true, "n2": true, "n": false, "1": false, "": false, "zone-a": false} {
		if any, named := h.Nodes(name); !any || named != want {
			t.Errorf("node %q: hints for nodes %v, for it %v", name, any, named)
		}
	}
	if any, named := h.Zones("zone-a"); !any || !named {
		t.Error("the zone is not named")
	}
	if any, named := h.Zones("n1"); !any || named {
		t.Error("a node is named as a zone")
	}
	if any, named := (Hints{}).Nodes("n1"); any || named {
		t.Error("no hints name a node")
	}
	if any, named := HintsFor(nil, []string{"a"}).Nodes(""); any || named {
		t.Error("hints for zones are hints for nodes")
	}
}

// Hints are the same after they were written down.
func TestHintsAsText(t *testing.T) {
	for _, h := range []Hints{{}, HintsFor([]string{"n1", "n2"}, nil), HintsFor(nil, []string{"a"}), HintsFor([]string{"n"}, []string{"a", "b"})} {
		text, err := h.MarshalText()
		var read Hints
		if err != nil || read.UnmarshalText(text) != nil || read != h {
			t.Errorf("%q was read as other hints", text)
		}
	}
	if err := new(Hints).UnmarshalText([]byte("zones")); err == nil {
		t.Error("what are no hints was read")
	}
}
