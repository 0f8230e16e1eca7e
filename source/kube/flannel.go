package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/cluster"
)

// Answer is what a Node is to say to flannel's nodes, by what it says and by its addresses;
// nil is nothing. It is not ok where what the Node says is to stay as it is, to the letter:
// flannel's own words need not be those that would be written here.
type Answer func(said *model.Flannel, addresses []netip.Addr) (want *model.Flannel, ok bool)

// SayToFlannel makes the Node of the settings say what it is to say to flannel's nodes, and
// says whether it said something else. It changes those annotations alone, and fails if
// the Node is changed by others at the same time, so that one tries again. It asks one
// server after the other, each once. Looking needs the verb list, which the agent has,
// changing patch.
func SayToFlannel(ctx context.Context, settings Settings, is Answer) (changed bool, err error) {
	err = askEach(settings, "change flannel's annotations of Node "+settings.Node, func(at *server) (decided bool, err error) {
		changed, err = at.sayToFlannel(ctx, settings.Node, is)
		return answered(err), err
	})
	return changed, err
}

func (s *server) sayToFlannel(ctx context.Context, name string, is Answer) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	node, err := s.node(ctx, name)
	if err != nil {
		return false, err
	}
	object, err := cluster.Read(cluster.At(s.url), node)
	if err != nil {
		return false, err
	}
	n := object.Node()
	if n == nil {
		return false, fmt.Errorf("read Node %s: it cannot be understood", name)
	}
	want, ok := is(n.Flannel, n.Addresses)
	if !ok {
		return false, nil
	}
	patch := flannelPatch(node, want)
	if patch == nil {
		return false, nil
	}
	return true, s.client.Patch(types.MergePatchType).AbsPath("/api/v1/nodes", name).MaxRetries(0).Body(patch).Do(ctx).Error()
}

// node asks for one Node, by the right to list.
func (s *server) node(ctx context.Context, name string) (*corev1.Node, error) {
	found, err := s.client.Get().AbsPath("/api/v1/nodes").Param("fieldSelector", "metadata.name="+name).MaxRetries(0).Do(ctx).Get()
	if err != nil {
		return nil, err
	}
	list, ok := found.(*corev1.NodeList)
	if !ok {
		return nil, fmt.Errorf("the answer is a %T", found)
	}
	if len(list.Items) == 0 {
		return nil, apierrors.NewNotFound(corev1.Resource("nodes"), name)
	}
	return &list.Items[0], nil
}

// flannelPatch makes the annotations of a Node what they are to be, as long as it is the one
// that was looked at (a JSON merge patch, RFC 7386); nil if they are.
func flannelPatch(node *corev1.Node, want *model.Flannel) []byte {
	said, differs := cluster.AnnotationsOf(want), map[string]any{}
	for _, name := range cluster.FlannelAnnotations {
		text, wanted := said[name]
		is, there := node.Annotations[name]
		switch {
		case wanted && (!there || is != text):
			differs[name] = text
		case !wanted && there:
			differs[name] = nil
		}
	}
	if len(differs) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": node.ResourceVersion, "annotations": differs}})
	if err != nil {
		panic(err) // plain values
	}
	return patch
}
