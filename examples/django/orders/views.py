"""Accept orders and list them."""

from django.db import transaction
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt

from sekuire.contrib.django import submit_on_commit

from .models import Order


@csrf_exempt
def orders(request):
    if request.method == "POST":
        with transaction.atomic():
            order = Order.objects.create(item=request.POST["item"])
            # The worker must find the order, so the task is submitted only when the order is committed.
            submit_on_commit("confirm_order", {"order_id": order.pk})
        return JsonResponse({"order_id": order.pk}, status=201)
    return JsonResponse({"orders": list(Order.objects.values("id", "item", "confirmation").order_by("id"))})
